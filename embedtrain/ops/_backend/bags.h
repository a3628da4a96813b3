// Bags of rows, as pooling forward and the sums of gradients backward see them.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "embedtrain.h"
#include "parallel.h"
#include "rows.h"

namespace embedtrain {

using Feature = EmbedtrainFeature;

// A row that is to be added, and its factor.
template <typename Stored>
struct Term {
    const Stored* row;
    float factor;
};

// target[0 .. 8 kBlocks) = factor * sum of the terms' columns, in registers.
template <int kBlocks, typename Terms>
EMBEDTRAIN_INLINE void sum_blocks(Terms term, int64_t count, float factor, float* target) {
    float8v total[kBlocks];
    EMBEDTRAIN_UNROLL
    for (int b = 0; b < kBlocks; ++b) total[b] = float8v{};
    for (int64_t i = 0; i < count; ++i) {
        const auto [row, weight] = term(i);
        EMBEDTRAIN_UNROLL
        for (int b = 0; b < kBlocks; ++b) {
            float8v values;
            load_row(values, row + 8 * b);
            total[b] += values * weight;
        }
    }
    EMBEDTRAIN_UNROLL
    for (int b = 0; b < kBlocks; ++b) {
        total[b] *= factor;
        store(target + 8 * b, total[b]);
    }
}

// target = factor * sum over the terms of term.factor * term.row; zeros where there is none.
template <typename Terms>
EMBEDTRAIN_INLINE void sum_terms(Terms term, int64_t count, float factor, int64_t dim, float* target) {
    int64_t d = 0;
    const auto from = [&](int64_t column) {
        return [=](int64_t i) __attribute__((always_inline)) {
            auto one = term(i);
            one.row += column;
            return one;
        };
    };
    for (; d + 128 <= dim; d += 128) sum_blocks<16>(from(d), count, factor, target + d);
    if (d + 64 <= dim) sum_blocks<8>(from(d), count, factor, target + d), d += 64;
    if (d + 32 <= dim) sum_blocks<4>(from(d), count, factor, target + d), d += 32;
    if (d + 16 <= dim) sum_blocks<2>(from(d), count, factor, target + d), d += 16;
    if (d == dim) return;
    float rest[16] = {};
    for (int64_t i = 0; i < count; ++i) {
        const auto [row, weight] = term(i);
        for (int64_t c = 0; c < dim - d; ++c) rest[c] += to_float(row[d + c]) * weight;
    }
    for (int64_t c = 0; c < dim - d; ++c) target[d + c] = rest[c] * factor;
}

// The bags of several features, one feature after the other.
struct Bags {
    const Feature* features;
    int64_t num_features;

    int64_t num_values() const {
        int64_t total = 0;
        for (int64_t f = 0; f < num_features; ++f) total += features[f].num_values;
        return total;
    }
};

// How many indices and lengths of a call lie outside what they index. Results of a call that has any are of no use.
using Outside = std::atomic<int64_t>;

// Whether all of the indices lie in [0, bound).
EMBEDTRAIN_INLINE bool all_inside(const int64_t* indices, int64_t count, int64_t bound) {
    // The sign of either is set if an index lies outside; to compare would take vectors of 64 bits several steps.
    uint64_t signs = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint64_t index = static_cast<uint64_t>(indices[i]);
        signs |= index | (static_cast<uint64_t>(bound) - 1 - index);
    }
    return !(signs >> 63);
}

// How many bags, values and terms the features before have.
struct Before {
    int64_t bags = 0, values = 0, terms = 0;
};

// The gradient that a value hands on to its row. All values of a bag without weights hand on the same one: a term is a
// bag's there, else a value's.
using GradientTerm = Term<float>;

EMBEDTRAIN_INLINE bool has_term_per_bag(const Feature& feature) { return feature.lengths && !feature.weights; }

EMBEDTRAIN_INLINE int64_t num_terms(const Feature& feature) {
    return has_term_per_bag(feature) ? feature.num_bags : feature.num_values;
}

// Visits the bags of a part: visit(feature, before, bag, first value of the feature, number of values). Bags whose values
// are not the feature's are counted and left out: the caller may have written to the lengths since they were checked.
template <typename Visit>
EMBEDTRAIN_INLINE void visit_bags(const Bags& bags, int part, int num_parts, Outside* outside, Visit visit) {
    int64_t num_bags = 0;
    for (int64_t f = 0; f < bags.num_features; ++f) num_bags += bags.features[f].num_bags;
    const Range range = range_of_part(num_bags, part, num_parts);
    Before before;
    for (int64_t f = 0; f < bags.num_features; ++f) {
        const Feature& feature = bags.features[f];
        const int64_t begin = std::clamp<int64_t>(range.begin - before.bags, 0, feature.num_bags);
        const int64_t end = std::clamp<int64_t>(range.end - before.bags, 0, feature.num_bags);
        if (!feature.lengths) {
            // Bags of one value need no look at each.
            if (feature.num_bags != feature.num_values) {
                ++*outside;
            } else {
                for (int64_t bag = begin; bag < end; ++bag) visit(feature, before, bag, bag, int64_t{1});
            }
        } else if (begin < end) {
            int64_t value = 0;
            for (int64_t bag = 0; bag < begin; ++bag) value += feature.lengths[bag];
            for (int64_t bag = begin; bag < end; ++bag) {
                const int64_t length = feature.lengths[bag];
                if (length < 0 || value < 0 || value > feature.num_values || length > feature.num_values - value) {
                    ++*outside;
                    break;
                }
                visit(feature, before, bag, value, length);
                value += length;
            }
            if (end == feature.num_bags && value != feature.num_values) ++*outside;
        }
        if (part == 0 && feature.num_bags == 0 && feature.num_values) ++*outside;
        before.bags += feature.num_bags;
        before.values += feature.num_values;
        before.terms += num_terms(feature);
    }
}

// The terms of all features, one feature after the other, in the calling thread's scratch 1; scratch 0 holds zeros,
// for where no gradient came back. per_value: a term for each value even where a bag would do. If any length is counted
// as outside, terms are missing.
const GradientTerm* find_terms(const Bags& bags, int64_t dim, bool per_value, int num_parts, Outside* outside);

}  // namespace embedtrain
