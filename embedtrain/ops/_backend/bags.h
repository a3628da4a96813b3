// Bags of rows, for pooling and for summing gradients.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "embedtrain.h"
#include "parallel.h"
#include "rows.h"

namespace embedtrain {

using Feature = EmbedtrainFeature;

// A row to add, and its factor.
template <typename Stored>
struct Term {
    const Stored* row;
    float factor;
};

// target[0 .. 8 * kBlocks) = factor * sum of the terms' columns. The sums stay in registers.
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

// target = factor * sum over the terms of term.factor * term.row; zeros if there are no terms.
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

// The bags of several features, in order of feature.
struct Bags {
    const Feature* features;
    int64_t num_features;

    int64_t num_values() const {
        int64_t total = 0;
        for (int64_t f = 0; f < num_features; ++f) total += features[f].num_values;
        return total;
    }
};

// Number of indices and lengths of a call that are out of range. If positive, the results are meaningless.
using Outside = std::atomic<int64_t>;

// Returns whether all indices lie in [0, bound).
EMBEDTRAIN_INLINE bool all_inside(const int64_t* indices, int64_t count, int64_t bound) {
    // The sign bit of `index` or of `bound - 1 - index` is set if the index is out of range. Comparing 64-bit vectors
    // would take several instructions.
    uint64_t signs = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint64_t index = static_cast<uint64_t>(indices[i]);
        signs |= index | (static_cast<uint64_t>(bound) - 1 - index);
    }
    return !(signs >> 63);
}

// Numbers of bags, values and terms in all preceding features.
struct Before {
    int64_t bags = 0, values = 0, terms = 0;
};

// The gradient that a value adds to its row. Without weights all values of a bag add the same gradient, so there is one
// term per bag; with weights there is one term per value.
using GradientTerm = Term<float>;

EMBEDTRAIN_INLINE bool has_term_per_bag(const Feature& feature) { return feature.lengths && !feature.weights; }

EMBEDTRAIN_INLINE int64_t num_terms(const Feature& feature) {
    return has_term_per_bag(feature) ? feature.num_bags : feature.num_values;
}

// Calls visit(feature, before, bag, first value in the feature, number of values) for the bags of a part. Bags that
// exceed the values of their feature are counted in `outside` and skipped, because the caller may have changed the
// lengths after they were checked.
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
            // With one value per bag, the lengths need no check.
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

// Writes the sum of the terms of distinct row `j`, times `factor`, to `target`, and prefetches terms of later rows.
// terms: [num_values]; order and starts: as in embedtrain_pool_rows_backward. The indices of row `j` must be in range.
EMBEDTRAIN_INLINE void sum_distinct_row(const GradientTerm* terms, const int64_t* order, const int64_t* starts,
                                        int64_t j, int64_t num_values, float factor, int64_t dim, float* target) {
    const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(float)), ahead = rows_ahead_to_read(row_bytes);
    for (int64_t v = starts[j]; v < starts[j + 1]; ++v) {
        if (v + 2 * ahead >= num_values) continue;
        __builtin_prefetch(terms + order[v + 2 * ahead]);
        const int64_t next = order[v + ahead];
        if (static_cast<uint64_t>(next) < static_cast<uint64_t>(num_values)) {
            prefetch_row<0>(terms[next].row, row_bytes);
        }
    }
    const int64_t* own = order + starts[j];
    sum_terms([=](int64_t i) __attribute__((always_inline)) { return terms[own[i]]; }, starts[j + 1] - starts[j],
              factor, dim, target);
}

// Returns the terms of all features, ordered by feature, in slot 1 of the calling thread's scratch memory. Slot 0 holds
// a row of zeros for features without a gradient. per_value: one term per value, also for features without weights. If
// a length is out of range, terms are missing.
const GradientTerm* find_terms(const Bags& bags, int64_t dim, bool per_value, int num_parts, Outside* outside);

}  // namespace embedtrain
