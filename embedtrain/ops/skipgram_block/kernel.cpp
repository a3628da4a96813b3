// Negative-sampling skip-gram over a block: loss and gradient on the block's distinct rows.
//
// Per centre, one small matrix product gives the logits of all its contexts and targets (the centre and its negatives),
// and two more give the gradients.
//
// The vectors of the words around the centre stay in a ring buffer of aligned rows, together with their gradients. So
// each word is loaded once and its gradient is stored once, for all centres that it is a context of. Targets are copied
// to aligned rows too. Rows are padded to whole vectors, so the products need no special case for the last columns.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "embedtrain.h"
#include "parallel.h"
#include "rows.h"

namespace {

using namespace embedtrain;

constexpr int kLanes = 16;
constexpr int kTargets = 6;  // targets per group: the centre and five negatives; more negatives need more groups
constexpr int kSlots = 8;    // logits of a context (half a vector): kTargets and two unused lanes
// Larger logits are clamped in exp, which would overflow, and their loss is the logit itself. The comparisons are
// written so that NaN propagates.
constexpr float kLargestLogit = 80.0f;
constexpr int kLargestPower = 96;  // number of factors, each at most 2, whose product cannot overflow a float32
constexpr int64_t kCentresAhead = 3;  // prefetch distance, in centres

struct Block {
    const float* vectors;
    int64_t num_vectors, dim;
    const int64_t *inputs, *targets, *starts, *stops;
    int64_t num_positions, num_targets;
    float factor;
    float* grad;
};

typedef int32_t int16v __attribute__((vector_size(64)));

// These functions sum the lanes of several vectors at once. Each step halves the number of lanes per sum and
// interleaves the vectors.
EMBEDTRAIN_INLINE float16v sums_by_two(const float16v& a, const float16v& b) {
    const int16v low = {0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29};
    const int16v high = {2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31};
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

EMBEDTRAIN_INLINE float16v sums_by_four(const float16v& ab, const float16v& cd) {
    const int16v low = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    const int16v high = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
    return __builtin_shuffle(ab, cd, low) + __builtin_shuffle(ab, cd, high);
}

EMBEDTRAIN_INLINE float16v sums_of_quarters(const float16v& a, const float16v& b) {
    const int16v even = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
    const int16v odd = {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31};
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// Returns partial sums of a context's products with the targets. The first two quarters hold two parts of the sums of
// targets 0 to 3, and the last two hold two parts of the sums of targets 4 and 5 and of two zeros.
EMBEDTRAIN_INLINE float16v half_sums(const float16v* products) {
    const float16v first = sums_by_four(sums_by_two(products[0], products[1]), sums_by_two(products[2], products[3]));
    const float16v second = sums_by_four(sums_by_two(products[4], products[5]), float16v{});
    return sums_of_quarters(first, second);
}

// Products of contexts and targets, summed over columns in each of 16 lanes. An AVX2 register holds 8 lanes, and there
// are too few registers for all sums at once. So with `float8v` the lower lanes are computed first, then the upper.
template <typename Vector, int kContexts>
EMBEDTRAIN_INLINE void lane_products(const float* const* contexts, const float* targets, int64_t width,
                                     float16v* products) {
    constexpr int kStep = sizeof(Vector) / sizeof(float);
    EMBEDTRAIN_UNROLL
    for (int half = 0; half < kLanes; half += kStep) {
        Vector sums[kContexts * kTargets];
        EMBEDTRAIN_UNROLL
        for (int i = 0; i < kContexts * kTargets; ++i) sums[i] = Vector{};
        for (int64_t d = half; d < width; d += kLanes) {
            Vector x[kContexts];
            EMBEDTRAIN_UNROLL
            for (int c = 0; c < kContexts; ++c) load(x[c], contexts[c] + d);
            EMBEDTRAIN_UNROLL
            for (int t = 0; t < kTargets; ++t) {
                Vector y;
                load(y, targets + t * width + d);
                EMBEDTRAIN_UNROLL
                for (int c = 0; c < kContexts; ++c) sums[c * kTargets + t] += x[c] * y;
            }
        }
        EMBEDTRAIN_UNROLL
        for (int i = 0; i < kContexts * kTargets; ++i) store(reinterpret_cast<float*>(products + i) + half, sums[i]);
    }
}

// logits[c][t] = contexts[c] . targets[t]. Logits are written for two contexts at a time.
template <typename Vector, int kContexts>
EMBEDTRAIN_INLINE void dot_products(const float* const* contexts, const float* targets, int64_t width,
                                    float* logits) {
    float16v products[kContexts * kTargets];
    lane_products<Vector, kContexts>(contexts, targets, width, products);
    EMBEDTRAIN_UNROLL
    for (int c = 0; c < kContexts; c += 2) {
        const float16v other = c + 1 < kContexts ? half_sums(products + (c + 1) * kTargets) : float16v{};
        store(logits + c * kSlots, sums_of_quarters(half_sums(products + c * kTargets), other));
    }
}

// Accumulates losses. Terms log(1 + u) are summed as the logarithm of a product, which needs fewer logarithms.
struct Loss {
    float16v linear = {}, product = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    int power = 0;
    double total = 0.0;

    EMBEDTRAIN_INLINE void settle() {
        for (int i = 0; i < kLanes; ++i) {
            total += static_cast<double>(linear[i]) + std::log(static_cast<double>(product[i]));
            linear[i] = 0.0f;
            product[i] = 1.0f;
        }
        power = 0;
    }
};

// Replaces the logits of two contexts by the derivatives of their losses, and adds the losses. A positive factor marks
// a negative, whose derivative is factor * sigmoid(logit). A negative factor marks the centre, whose derivative is
// factor * sigmoid(-logit). A factor of zero skips a logit.
EMBEDTRAIN_INLINE void slopes_in_place(float* logits, const float* factors, Loss& loss) {
    float growth[kLanes], excess[kLanes];
#pragma omp simd
    for (int i = 0; i < kLanes; ++i) {
        const float z = factors[i] < 0.0f ? -logits[i] : logits[i];
        const float magnitude = z < 0.0f ? -z : z;
        const float decay = exponential(-(magnitude > kLargestLogit ? kLargestLogit : magnitude));
        const float probability = (z < 0.0f ? decay : 1.0f) / (1.0f + decay);
        growth[i] = factors[i] != 0.0f ? 1.0f + decay : 1.0f;
        excess[i] = factors[i] != 0.0f && !(z <= 0.0f) ? z : 0.0f;
        logits[i] = factors[i] != 0.0f ? probability * factors[i] : 0.0f;
    }
    float16v factor, more;
    load(factor, growth);
    load(more, excess);
    loss.product *= factor;
    loss.linear += more;
    if (++loss.power == kLargestPower) loss.settle();
}

// Calls add(a, column, values) with the sum over b of factors[a * a_stride + b * b_stride] * rows[b], for a < kSums,
// from column `d` on and kBlocks vectors at a time. Returns the first column that is not done.
template <typename Vector, int kSums, int kBlocks, typename Add>
EMBEDTRAIN_INLINE int64_t add_combinations(const float* factors, int a_stride, int b_stride, const float* const* rows,
                                           int num_rows, int64_t d, int64_t width, Add add) {
    constexpr int kStep = sizeof(Vector) / sizeof(float);
    for (; d + kBlocks * kStep <= width; d += kBlocks * kStep) {
        Vector total[kSums * kBlocks];
        EMBEDTRAIN_UNROLL
        for (int i = 0; i < kSums * kBlocks; ++i) total[i] = Vector{};
        for (int b = 0; b < num_rows; ++b) {
            Vector row[kBlocks];
            EMBEDTRAIN_UNROLL
            for (int k = 0; k < kBlocks; ++k) load(row[k], rows[b] + d + k * kStep);
            EMBEDTRAIN_UNROLL
            for (int a = 0; a < kSums; ++a) {
                const float factor = factors[a * a_stride + b * b_stride];
                EMBEDTRAIN_UNROLL
                for (int k = 0; k < kBlocks; ++k) total[a * kBlocks + k] += row[k] * factor;
            }
        }
        EMBEDTRAIN_UNROLL
        for (int i = 0; i < kSums * kBlocks; ++i) add(i / kBlocks, d + i % kBlocks * kStep, total[i]);
    }
    return d;
}

EMBEDTRAIN_INLINE void add_columns(float* target, const float* source, int64_t count) {
    int64_t d = 0;
    for (; d + 4 <= count; d += 4) {
        float4v a, b;
        load(a, target + d);
        load(b, source + d);
        store(target + d, a + b);
    }
    for (; d < count; ++d) target[d] += source[d];
}

// Adds a vector to a row from column `d` on; columns past the end of the row are ignored.
template <typename Vector>
EMBEDTRAIN_INLINE void add_vector(float* row, int64_t d, int64_t dim, const Vector& values) {
    constexpr int kStep = sizeof(Vector) / sizeof(float);
    if (d + kStep <= dim) {
        Vector old;
        load(old, row + d);
        store(row + d, old + values);
    } else if (d < dim) {
        float copy[kStep];
        store(copy, values);
        add_columns(row + d, copy, dim - d);
    }
}

EMBEDTRAIN_INLINE void copy_row(float* target, const float* source, int64_t dim) {
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
        float16v values;
        load(values, source + d);
        store(target + d, values);
    }
    for (; d + 4 <= dim; d += 4) {
        float4v values;
        load(values, source + d);
        store(target + d, values);
    }
    for (; d < dim; ++d) target[d] = source[d];
}

EMBEDTRAIN_INLINE void move_home(float* home, float* gathered, int64_t dim, int64_t width) {
    for (int64_t d = 0; d < width; d += kLanes) {
        float16v values;
        load(values, gathered + d);
        add_vector(home, d, dim, values);
        store(gathered + d, float16v{});
    }
}

// The vectors of the words around a centre, and buffers for their gradients, targets and logits.
struct Workspace {
    int64_t width;  // dim rounded up to whole vectors; the columns past dim are zero
    int64_t reach, mask;
    float *contexts, *context_grads;  // [mask + 1, width]; position p lies at row p & mask
    float *targets;                   // [kTargets, width]
    float *logits;                    // [2 * reach, kSlots], an even number of rows
    const float** rows;               // [2 * reach]; the contexts of the centre
    float** grads;

    explicit Workspace(const Block& block) : width((block.dim + kLanes - 1) / kLanes * kLanes), reach(0), mask(1) {
        for (int64_t i = 0; i < block.num_positions; ++i) {
            reach = std::max({reach, i - block.starts[i], block.stops[i] - 1 - i});
        }
        while (mask < 2 * reach) mask = 2 * mask + 1;
        const int64_t num_contexts = 2 * reach + 2;
        const int64_t num_floats = 2 * (mask + 1) * width + kTargets * width + num_contexts * kSlots;
        contexts = static_cast<float*>(scratch(0, num_floats * 4 + num_contexts * 16));
        std::fill_n(contexts, num_floats, 0.0f);
        context_grads = contexts + (mask + 1) * width;
        targets = context_grads + (mask + 1) * width;
        logits = targets + kTargets * width;
        rows = reinterpret_cast<const float**>(logits + num_contexts * kSlots);
        grads = const_cast<float**>(rows) + num_contexts;
    }
};

// Prefetches a row and its gradient.
EMBEDTRAIN_INLINE void prefetch_pair(const Block& block, int64_t row) {
    prefetch_row<0>(block.vectors + row * block.dim, block.dim * 4);
    prefetch_row<1>(block.grad + row * block.dim, block.dim * 4);
}

// Adds the contribution of the targets to the gradients of kContexts contexts, from context `first` on.
template <typename Vector, int kContexts, int kBlocks>
EMBEDTRAIN_INLINE void add_to_contexts(const Workspace& work, int first, const float* const* targets) {
    const float* slopes = work.logits + first * kSlots;
    float* const* grads = work.grads + first;
    const auto add = [=](int a, int64_t d, const Vector& values) __attribute__((always_inline)) {
        Vector old;
        load(old, grads[a] + d);
        store(grads[a] + d, old + values);
    };
    const int64_t d = add_combinations<Vector, kContexts, kBlocks>(slopes, kSlots, 1, targets, kTargets, 0, work.width,
                                                                   add);
    add_combinations<Vector, kContexts, 1>(slopes, kSlots, 1, targets, kTargets, d, work.width, add);
}

// Adds loss and gradients of a centre's contexts against a group of up to kTargets targets, from target `first` on.
template <typename Vector, int kAtOnce, int kBlocks>
EMBEDTRAIN_INLINE void add_group(const Block& block, const Workspace& work, int64_t centre, int64_t first,
                                 int num_contexts, Loss& loss) {
    const int64_t dim = block.dim, width = work.width;
    const int64_t* rows = block.targets + centre * block.num_targets;
    float factors[kLanes], last_factors[kLanes];
    float* homes[kTargets];
    const float* targets[kTargets];
    for (int t = 0; t < kSlots; ++t) {
        const int64_t number = first + t;
        const bool is_there = t < kTargets && number < block.num_targets;
        const bool counts = is_there && (number == 0 || rows[number] != rows[0]);
        factors[t] = factors[kSlots + t] = !counts ? 0.0f : number == 0 ? -block.factor : block.factor;
        last_factors[t] = factors[t];
        last_factors[kSlots + t] = 0.0f;
    }
    for (int t = 0; t < kTargets; ++t) {
        // Slots past the last target use the last target's row with slopes of zero.
        const int64_t row = rows[std::min(first + t, block.num_targets - 1)];
        homes[t] = block.grad + row * dim;
        targets[t] = work.targets + t * width;
        copy_row(work.targets + t * width, block.vectors + row * dim, dim);
    }
    int c = 0;
    for (; c + kAtOnce <= num_contexts; c += kAtOnce) {
        dot_products<Vector, kAtOnce>(work.rows + c, work.targets, width, work.logits + c * kSlots);
    }
    for (; c + 2 <= num_contexts; c += 2) {
        dot_products<Vector, 2>(work.rows + c, work.targets, width, work.logits + c * kSlots);
    }
    if (c < num_contexts) dot_products<Vector, 1>(work.rows + c, work.targets, width, work.logits + c * kSlots);
    for (c = 0; c < num_contexts; c += 2) {
        slopes_in_place(work.logits + c * kSlots, c + 1 < num_contexts ? factors : last_factors, loss);
    }

    for (c = 0; c + kAtOnce <= num_contexts; c += kAtOnce) add_to_contexts<Vector, kAtOnce, kBlocks>(work, c, targets);
    for (; c + 2 <= num_contexts; c += 2) add_to_contexts<Vector, 2, kBlocks>(work, c, targets);
    if (c < num_contexts) add_to_contexts<Vector, 1, kBlocks>(work, c, targets);
    // Targets are added one after the other, so a row that was drawn twice gets both sums.
    const auto to_target = [&](int a, int64_t d, const Vector& values) __attribute__((always_inline)) {
        add_vector(homes[a], d, dim, values);
    };
    const int64_t d = add_combinations<Vector, kTargets, kBlocks>(work.logits, 1, kSlots, work.rows, num_contexts, 0,
                                                                  width, to_target);
    add_combinations<Vector, kTargets, 1>(work.logits, 1, kSlots, work.rows, num_contexts, d, width, to_target);
}

template <typename Vector, int kAtOnce, int kBlocks>
EMBEDTRAIN_INLINE double add_block(const Block& block) {
    const int64_t dim = block.dim, n = block.num_positions;
    const Workspace work(block);
    std::fill_n(block.grad, block.num_vectors * dim, 0.0f);
    Loss loss;
    int64_t next = 0;
    for (int64_t centre = 0; centre <= n + work.reach; ++centre) {
        const int64_t leaving = centre - work.reach - 1;
        if (leaving >= 0 && leaving < n) {
            move_home(block.grad + block.inputs[leaving] * dim, work.context_grads + (leaving & work.mask) * work.width,
                      dim, work.width);
        }
        for (; next < n && next <= centre + work.reach; ++next) {
            copy_row(work.contexts + (next & work.mask) * work.width, block.vectors + block.inputs[next] * dim, dim);
            if (next + kCentresAhead < n) prefetch_pair(block, block.inputs[next + kCentresAhead]);
        }
        if (centre >= n) continue;
        if (centre + kCentresAhead < n) {
            const int64_t* ahead = block.targets + (centre + kCentresAhead) * block.num_targets;
            for (int64_t t = 0; t < block.num_targets; ++t) prefetch_pair(block, ahead[t]);
        }
        int num_contexts = 0;
        for (int64_t p = block.starts[centre]; p < block.stops[centre]; ++p) {
            if (p == centre) continue;
            work.rows[num_contexts] = work.contexts + (p & work.mask) * work.width;
            work.grads[num_contexts++] = work.context_grads + (p & work.mask) * work.width;
        }
        if (num_contexts == 0) continue;
        for (int64_t first = 0; first < block.num_targets; first += kTargets) {
            add_group<Vector, kAtOnce, kBlocks>(block, work, centre, first, num_contexts, loss);
        }
    }
    loss.settle();
    return loss.total;
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// Uses as many sums at once as fit into the 32 AVX-512 registers.
__attribute__((target("arch=x86-64-v4"))) double add_block_in_wide_registers(const Block& block) {
    return add_block<float16v, 4, 2>(block);
}
#endif

EMBEDTRAIN_MULTIVERSION double add_block_in_any_registers(const Block& block) {
    return add_block<float8v, 2, 2>(block);
}

// Counts indices and windows that are out of range.
EMBEDTRAIN_MULTIVERSION int64_t count_outside(const Block& block) {
    const uint64_t num_rows = static_cast<uint64_t>(block.num_vectors);
    int64_t outside = 0;
    for (int64_t i = 0; i < block.num_positions; ++i) {
        outside += static_cast<uint64_t>(block.inputs[i]) >= num_rows;
        outside += block.starts[i] < 0 || block.starts[i] > i || block.stops[i] <= i;
        outside += block.stops[i] > block.num_positions;
    }
    for (int64_t i = 0; i < block.num_positions * block.num_targets; ++i) {
        outside += static_cast<uint64_t>(block.targets[i]) >= num_rows;
    }
    return outside;
}

}  // namespace

void embedtrain_skipgram_block(const float* vectors, int64_t num_vectors, int64_t dim,
                               const int64_t* inputs, const int64_t* targets, const int64_t* starts,
                               const int64_t* stops, int64_t num_positions, int64_t num_targets,
                               float factor, double* loss, float* grad, int64_t* num_outside) {
    const Block block{vectors, num_vectors, dim, inputs, targets, starts, stops, num_positions, num_targets, factor,
                      grad};
    *num_outside = count_outside(block);
    if (*num_outside) return;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
    if (__builtin_cpu_supports("x86-64-v4")) {
        *loss = add_block_in_wide_registers(block);
        return;
    }
#endif
    *loss = add_block_in_any_registers(block);
}
