// Sums of random rows: bags of a batch forward, and the gradient of each distinct row backward.

#include <algorithm>
#include <cstdint>

#include "parallel.h"
#include "rows.h"

namespace {

using namespace embedtrain;

// One feature's bags, as the caller lays them out in 64-bit words.
struct Feature {
    const int64_t* lengths;  // [num_bags], or null: every bag holds one value
    const float* weights;    // [num_values], or null
    float* vectors;          // [num_bags, row_stride]: pooled vectors forward, their gradient backward; null: zeros
    int64_t row_stride;
    int64_t num_bags, num_values;
    int64_t is_mean;
};

// A row that is to be added, and its factor.
template <typename Stored>
struct Term {
    const Stored* row;
    float factor;
};

// total[0 .. 16 kBlocks) = factor * sum of the terms' columns, in registers.
template <int kBlocks, typename Terms>
EMBEDTRAIN_INLINE void sum_blocks(Terms term, int64_t count, float factor, float* target) {
    float16v total[kBlocks] = {};
    for (int64_t i = 0; i < count; ++i) {
        const auto [row, weight] = term(i);
        for (int b = 0; b < kBlocks; ++b) {
            float16v values;
            load_row(values, row + 16 * b);
            total[b] += values * weight;
        }
    }
    for (int b = 0; b < kBlocks; ++b) {
        total[b] *= factor;
        store(target + 16 * b, total[b]);
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
    for (; d + 128 <= dim; d += 128) sum_blocks<8>(from(d), count, factor, target + d);
    if (d + 64 <= dim) sum_blocks<4>(from(d), count, factor, target + d), d += 64;
    if (d + 32 <= dim) sum_blocks<2>(from(d), count, factor, target + d), d += 32;
    if (d + 16 <= dim) sum_blocks<1>(from(d), count, factor, target + d), d += 16;
    if (d == dim) return;
    float rest[16] = {};
    for (int64_t i = 0; i < count; ++i) {
        const auto [row, weight] = term(i);
        for (int64_t c = 0; c < dim - d; ++c) rest[c] += to_float(row[d + c]) * weight;
    }
    for (int64_t c = 0; c < dim - d; ++c) target[d + c] = rest[c] * factor;
}

struct Pooling {
    const void* source;
    int64_t dim;
    const int64_t* index;
    int64_t num_values;
    const Feature* features;
    int64_t num_features;
    int num_parts;
};

// Visits the bags of a part: visit(feature, bag, first value, number of values).
template <typename Visit>
EMBEDTRAIN_INLINE void visit_bags(const Pooling& p, int part, Visit visit) {
    int64_t num_bags = 0;
    for (int64_t f = 0; f < p.num_features; ++f) num_bags += p.features[f].num_bags;
    const Range range = range_of_part(num_bags, part, p.num_parts);
    int64_t first_bag = 0, first_value = 0;
    for (int64_t f = 0; f < p.num_features; ++f) {
        const Feature& feature = p.features[f];
        const int64_t begin = std::clamp<int64_t>(range.begin - first_bag, 0, feature.num_bags);
        const int64_t end = std::clamp<int64_t>(range.end - first_bag, 0, feature.num_bags);
        if (begin < end) {
            int64_t value = begin;
            if (feature.lengths) {
                value = 0;
                for (int64_t bag = 0; bag < begin; ++bag) value += feature.lengths[bag];
            }
            for (int64_t bag = begin; bag < end; ++bag) {
                const int64_t length = feature.lengths ? feature.lengths[bag] : 1;
                visit(feature, bag, first_value, value, length);
                value += length;
            }
        }
        first_bag += feature.num_bags;
        first_value += feature.num_values;
    }
}

template <typename Stored>
EMBEDTRAIN_INLINE void pool(const Pooling& p, int part) {
    const Stored* source = static_cast<const Stored*>(p.source);
    const int64_t row_bytes = p.dim * static_cast<int64_t>(sizeof(Stored));
    const int64_t dim = p.dim, num_values = p.num_values;
    const int64_t* index = p.index;
    visit_bags(p, part, [=](const Feature& feature, int64_t bag, int64_t first, int64_t value,
                            int64_t length) __attribute__((always_inline)) {
        for (int64_t v = first + value; v < first + value + length; ++v) {
            if (v + kPrefetchAhead < num_values) prefetch_row<0>(source + index[v + kPrefetchAhead] * dim, row_bytes);
        }
        const int64_t* bag_index = index + first + value;
        const float* weights = feature.weights ? feature.weights + value : nullptr;
        const float factor = feature.is_mean && length ? 1.0f / static_cast<float>(length) : 1.0f;
        sum_terms(
            [=](int64_t i) __attribute__((always_inline)) {
                return Term<Stored>{source + bag_index[i] * dim, weights ? weights[i] : 1.0f};
            },
            length, factor, dim, feature.vectors + bag * feature.row_stride);
    });
}

EMBEDTRAIN_MULTIVERSION void pool_float32(const void* p, int part) {
    pool<float>(*static_cast<const Pooling*>(p), part);
}

EMBEDTRAIN_MULTIVERSION void pool_bfloat16(const void* p, int part) {
    pool<uint16_t>(*static_cast<const Pooling*>(p), part);
}

struct Backward {
    Pooling bags;
    const int64_t *order, *starts;
    int64_t num_distinct;
    Term<float>* terms;  // [num_values]; the gradient that each value hands on
    const float* zeros;
    float factor;
    float* grad;
};

void find_terms(const void* arguments, int part) {
    const Backward& b = *static_cast<const Backward*>(arguments);
    visit_bags(b.bags, part,
               [&b](const Feature& feature, int64_t bag, int64_t first, int64_t value, int64_t length) {
                   const float* row = feature.vectors ? feature.vectors + bag * feature.row_stride : b.zeros;
                   const float factor = feature.is_mean && length ? 1.0f / static_cast<float>(length) : 1.0f;
                   for (int64_t v = value; v < value + length; ++v) {
                       b.terms[first + v] = {row, feature.weights ? feature.weights[v] * factor : factor};
                   }
               });
}

EMBEDTRAIN_MULTIVERSION void sum_gradients(const void* arguments, int part) {
    const Backward& b = *static_cast<const Backward*>(arguments);
    const int64_t dim = b.bags.dim, num_values = b.bags.num_values;
    const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(float));
    // Parts of about equally many values, cut where a distinct row begins.
    const Range values = range_of_part(num_values, part, b.bags.num_parts);
    const int64_t* end = b.starts + b.num_distinct;
    const int64_t first = std::lower_bound(b.starts, end, values.begin) - b.starts;
    const int64_t last = std::lower_bound(b.starts, end, values.end) - b.starts;
    const Term<float>* terms = b.terms;
    for (int64_t j = first; j < last; ++j) {
        for (int64_t v = b.starts[j]; v < b.starts[j + 1]; ++v) {
            if (v + 2 * kPrefetchAhead < num_values) {
                __builtin_prefetch(terms + b.order[v + 2 * kPrefetchAhead]);
                prefetch_row<0>(terms[b.order[v + kPrefetchAhead]].row, row_bytes);
            }
        }
        const int64_t* order = b.order + b.starts[j];
        sum_terms([=](int64_t i) __attribute__((always_inline)) { return terms[order[i]]; },
                  b.starts[j + 1] - b.starts[j], b.factor, dim, b.grad + j * dim);
    }
}

int parts_for(int64_t num_values, int64_t dim, int num_threads) {
    return num_values * dim < kSmallWork ? 1 : num_threads;
}

}  // namespace

// source: [..., dim] float32 or bfloat16; index: [num_values], all inside the source, feature after feature;
// features: [num_features]; their vectors are written.
extern "C" void embedtrain_pool_rows(const void* source, int is_bfloat16, int64_t dim, const int64_t* index,
                                     int64_t num_values, const void* features, int64_t num_features,
                                     int num_threads) {
    const int num_parts = parts_for(num_values, dim, num_threads);
    const Pooling p{source, dim, index, num_values, static_cast<const Feature*>(features), num_features, num_parts};
    run_parts(num_parts, is_bfloat16 ? pool_bfloat16 : pool_float32, &p);
}

// order: [num_values] and starts: [num_distinct + 1] as embedtrain_sort_unique gives them; features: as above, their
// vectors are read; grad: [num_distinct, dim], written: the sums times `factor`.
extern "C" void embedtrain_pool_rows_backward(int64_t dim, const int64_t* order, const int64_t* starts,
                                              int64_t num_distinct, int64_t num_values, const void* features,
                                              int64_t num_features, float factor, float* grad,
                                              int num_threads) {
    const int num_parts = parts_for(num_values, dim, num_threads);
    float* zeros = static_cast<float*>(scratch(0, dim * 4));
    std::fill_n(zeros, dim, 0.0f);
    Term<float>* terms = static_cast<Term<float>*>(scratch(1, num_values * static_cast<int64_t>(sizeof(Term<float>))));
    const Pooling bags{nullptr, dim, nullptr, num_values, static_cast<const Feature*>(features), num_features,
                       num_parts};
    const Backward b{bags, order, starts, num_distinct, terms, zeros, factor, grad};
    run_parts(num_parts, find_terms, &b);
    run_parts(num_parts, sum_gradients, &b);
}
