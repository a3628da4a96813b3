// Sums random rows: forward over bags, and backward over the gradients of each distinct row.

#include <algorithm>
#include <cstdint>

#include "bags.h"
#include "embedtrain.h"

namespace {

using namespace embedtrain;

struct Pooling {
    const void* source;
    int64_t dim;
    int64_t num_rows;
    const int64_t* index;
    int64_t num_values;
    Bags bags;
    int num_parts;
    Outside* outside;
};

// kDim: the dim as a compile-time constant, or 0 for any dim.
template <int kDim, typename Stored>
EMBEDTRAIN_INLINE void pool(const Pooling& p, int part) {
    const Stored* source = static_cast<const Stored*>(p.source);
    const int64_t dim = kDim ? kDim : p.dim, num_values = p.num_values;
    const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(Stored));
    const int64_t* index = p.index;
    const int64_t ahead = rows_ahead_to_read(row_bytes);
    visit_bags(p.bags, part, p.num_parts, p.outside, [=](const Feature& feature, Before before, int64_t bag, int64_t value,
                                              int64_t length) __attribute__((always_inline)) {
        const int64_t first = before.values + value;
        const auto prefetch = [=](int64_t v) __attribute__((always_inline)) {
            if (v + ahead < num_values) prefetch_row<0>(source + index[v + ahead] * dim, row_bytes);
        };
        // With a constant dim, sum_terms visits each term once, so it can prefetch one row while it adds another.
        if (!kDim) for (int64_t v = first; v < first + length; ++v) prefetch(v);
        const int64_t* bag_index = index + first;
        const float* weights = feature.weights ? feature.weights + value : nullptr;
        const float factor = feature.is_mean && length ? 1.0f / static_cast<float>(length) : 1.0f;
        sum_terms(
            [=](int64_t i) __attribute__((always_inline)) {
                if (kDim) prefetch(first + i);
                return Term<Stored>{source + bag_index[i] * dim, weights ? weights[i] : 1.0f};
            },
            length, factor, dim, feature.vectors + bag * feature.row_stride);
    });
}

// A separate pass, because the same check inside the loop over bags takes four times as long.
EMBEDTRAIN_MULTIVERSION void check_index(const void* pooling, int part) {
    const Pooling& p = *static_cast<const Pooling*>(pooling);
    const Range values = range_of_part(p.num_values, part, p.num_parts);
    if (!all_inside(p.index + values.begin, values.end - values.begin, p.num_rows)) ++*p.outside;
}

EMBEDTRAIN_MULTIVERSION void pool_float32(const void* pooling, int part) {
    const Pooling& p = *static_cast<const Pooling*>(pooling);
    switch (p.dim) {
        case 32: return pool<32, float>(p, part);
        case 64: return pool<64, float>(p, part);
        case 128: return pool<128, float>(p, part);
        default: return pool<0, float>(p, part);
    }
}

EMBEDTRAIN_MULTIVERSION void pool_bfloat16(const void* p, int part) {
    pool<0, uint16_t>(*static_cast<const Pooling*>(p), part);
}

struct Backward {
    int64_t dim;
    const int64_t *order, *starts;
    int64_t num_distinct, num_values;
    const GradientTerm* terms;  // [num_values]
    float factor;
    float* grad;
    int num_parts;
    Outside* outside;
    std::atomic<int64_t>* num_done;  // number of distinct rows done; too small if `starts` do not ascend
};

EMBEDTRAIN_MULTIVERSION void sum_gradients(const void* arguments, int part) {
    const Backward& b = *static_cast<const Backward*>(arguments);
    const int64_t dim = b.dim, num_values = b.num_values;
    // Parts have about equally many values and begin at a distinct row.
    const Range values = range_of_part(num_values, part, b.num_parts);
    const int64_t* end = b.starts + b.num_distinct;
    const int64_t first = std::lower_bound(b.starts, end, values.begin) - b.starts;
    const int64_t last = std::lower_bound(b.starts, end, values.end) - b.starts;
    *b.num_done += std::max<int64_t>(last - first, 0);
    for (int64_t j = first; j < last; ++j) {
        if (b.starts[j] < 0 || b.starts[j] > b.starts[j + 1] || b.starts[j + 1] > num_values ||
            !all_inside(b.order + b.starts[j], b.starts[j + 1] - b.starts[j], num_values)) {
            ++*b.outside;
            continue;
        }
        sum_distinct_row(b.terms, b.order, b.starts, j, num_values, b.factor, dim, b.grad + j * dim);
    }
}

int parts_for(int64_t num_values, int64_t dim, int num_threads) {
    return num_values * dim < kSmallWork ? 1 : num_threads;
}

}  // namespace

void embedtrain_pool_rows(const void* source, int64_t num_rows, int is_bfloat16, int64_t dim, const int64_t* index,
                          int64_t num_values, const EmbedtrainFeature* features, int64_t num_features,
                          int num_threads, int64_t* num_outside) {
    const int num_parts = parts_for(num_values, dim, num_threads);
    const Bags bags{features, num_features};
    Outside outside{bags.num_values() != num_values};
    const Pooling p{source, dim, num_rows, index, num_values, bags, num_parts, &outside};
    if (!outside) run_parts(num_parts, check_index, &p);
    if (!outside) run_parts(num_parts, is_bfloat16 ? pool_bfloat16 : pool_float32, &p);
    *num_outside = outside;
}

void embedtrain_pool_rows_backward(int64_t dim, const int64_t* order, const int64_t* starts,
                                   int64_t num_distinct, int64_t num_values, const EmbedtrainFeature* features,
                                   int64_t num_features, float factor, float* grad, int num_threads,
                                   int64_t* num_outside) {
    const int num_parts = parts_for(num_values, dim, num_threads);
    const Bags bags{features, num_features};
    Outside outside{bags.num_values() != num_values};
    const GradientTerm* terms = outside ? nullptr : find_terms(bags, dim, true, num_parts, &outside);
    std::atomic<int64_t> num_done{0};
    const Backward b{dim, order, starts, num_distinct, num_values, terms, factor, grad, num_parts, &outside,
                     &num_done};
    if (!outside) run_parts(num_parts, sum_gradients, &b);
    *num_outside = outside + (num_done != num_distinct);
}
