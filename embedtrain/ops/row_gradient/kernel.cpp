// Finds the largest magnitude of gradients, for a quick check that their sums are finite.

#include <algorithm>
#include <cstdint>

#include "bags.h"
#include "embedtrain.h"

namespace {

using namespace embedtrain;

// Without the sign bit, the bits of floats compare like magnitudes. Infinity and NaN compare above all numbers.
EMBEDTRAIN_MULTIVERSION uint32_t largest_bits(const float* values, int64_t count) {
    uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i, sizeof(bits));
        largest = std::max(largest, bits & 0x7FFFFFFF);
    }
    return largest;
}

}  // namespace

void embedtrain_largest_magnitude(const EmbedtrainFeature* features, int64_t num_features, int64_t dim,
                                  float* largest) {
    uint32_t bits[2] = {0, 0};
    const float one = 1.0f;
    std::memcpy(&bits[1], &one, sizeof(one));
    // In reverse order: the update reads in forward order, so it finds the values that are read last here in the cache.
    for (int64_t f = num_features; f-- > 0;) {
        const Feature& feature = features[f];
        if (feature.weights) bits[1] = std::max(bits[1], largest_bits(feature.weights, feature.num_values));
        if (!feature.vectors) continue;
        if (feature.row_stride == dim) {
            bits[0] = std::max(bits[0], largest_bits(feature.vectors, feature.num_bags * dim));
            continue;
        }
        for (int64_t bag = 0; bag < feature.num_bags; ++bag) {
            bits[0] = std::max(bits[0], largest_bits(feature.vectors + bag * feature.row_stride, dim));
        }
    }
    std::memcpy(largest, bits, sizeof(bits));
}
