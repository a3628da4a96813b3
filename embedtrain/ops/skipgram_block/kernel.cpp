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
#include <cstring>
#include <limits>

#include "embedtrain.h"
#include "parallel.h"
#include "rows.h"

namespace {

using namespace embedtrain;

constexpr int kTargets = 6;  // targets per group: the centre and five negatives; more negatives need more groups
constexpr int kSlots = 8;    // logits of a context: kTargets and two unused lanes
// Larger logits are clamped in exp, which would overflow, and their loss is the logit itself. The comparisons are
// written so that NaN propagates.
constexpr float kLargestLogit = 80.0f;
constexpr int kLargestPower = 96;  // number of factors, each at most 2, whose product cannot overflow a float32
constexpr int64_t kCentresAhead = 2;  // prefetch distance, in centres

template <typename Vector>
constexpr int kLanes = sizeof(Vector) / sizeof(float);

struct Block {
    const float* vectors;
    int64_t num_vectors, dim;
    const int64_t *inputs, *targets, *starts, *stops;
    int64_t num_positions, num_targets;
    float factor;
    float* grad;
};

// Returns the sums of the upper and the lower half.
EMBEDTRAIN_INLINE float8v in_eight_lanes(const float16v& v) {
    float8v halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return halves[0] + halves[1];
}

EMBEDTRAIN_INLINE float8v in_eight_lanes(const float8v& v) { return v; }

// The next three functions sum lanes of two vectors. Each halves the number of lanes per sum and interleaves the
// vectors.
EMBEDTRAIN_INLINE float8v sums_by_two(const float8v& a, const float8v& b) {
    const int8v even = {0, 8, 1, 9, 4, 12, 5, 13};
    const int8v odd = {2, 10, 3, 11, 6, 14, 7, 15};
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

EMBEDTRAIN_INLINE float8v sums_by_four(const float8v& ab, const float8v& cd) {
    const int8v even = {0, 1, 8, 9, 4, 5, 12, 13};
    const int8v odd = {2, 3, 10, 11, 6, 7, 14, 15};
    return __builtin_shuffle(ab, cd, even) + __builtin_shuffle(ab, cd, odd);
}

EMBEDTRAIN_INLINE float8v sums_of_halves(const float8v& abcd, const float8v& efgh) {
    const int8v low = {0, 1, 2, 3, 8, 9, 10, 11};
    const int8v high = {4, 5, 6, 7, 12, 13, 14, 15};
    return __builtin_shuffle(abcd, efgh, low) + __builtin_shuffle(abcd, efgh, high);
}

// logits[c][t] = contexts[c] . targets[t]; the two unused lanes get zeros.
template <typename Vector, int kContexts>
EMBEDTRAIN_INLINE void dot_products(const float* const* contexts, const float* targets, int64_t width, float* logits) {
    Vector sums[kContexts * kTargets];
    EMBEDTRAIN_UNROLL
    for (int i = 0; i < kContexts * kTargets; ++i) sums[i] = Vector{};
    for (int64_t d = 0; d < width; d += kLanes<Vector>) {
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
    for (int c = 0; c < kContexts; ++c) {
        float8v of_target[kTargets];
        EMBEDTRAIN_UNROLL
        for (int t = 0; t < kTargets; ++t) of_target[t] = in_eight_lanes(sums[c * kTargets + t]);
        const float8v first = sums_by_four(sums_by_two(of_target[0], of_target[1]),
                                           sums_by_two(of_target[2], of_target[3]));
        const float8v second = sums_by_four(sums_by_two(of_target[4], of_target[5]), float8v{});
        store(logits + c * kSlots, sums_of_halves(first, second));
    }
}

// Accumulates losses. Terms log(1 + u) are summed as the logarithm of a product, which needs fewer logarithms.
template <typename Vector>
struct Loss {
    Vector linear = {}, product = Vector{} + 1.0f;
    int power = 0;
    double total = 0.0;

    EMBEDTRAIN_INLINE void settle() {
        for (int i = 0; i < kLanes<Vector>; ++i) {
            total += static_cast<double>(linear[i]) + std::log(static_cast<double>(product[i]));
        }
        linear = Vector{};
        product = Vector{} + 1.0f;
        power = 0;
    }
};

template <typename Vector>
using Bits = decltype(Vector{} < Vector{});  // the integer vector of the same size

template <typename Vector>
EMBEDTRAIN_INLINE void load_bits(Bits<Vector>& bits, const int32_t* source) {
    std::memcpy(&bits, source, sizeof(bits));
}

// What each logit of a vector means. The compiler turns conditions that combine comparisons of 512-bit vectors into
// branches per lane, so they are masks.
struct Signs {
    float factors[2 * kSlots] = {};    // twice the same, because a vector may hold the logits of two contexts
    int32_t counted[2 * kSlots] = {};  // all bits for a logit that counts, none for one that is skipped
    int32_t flipped[2 * kSlots] = {};  // the sign bit for the centre, none for a negative

    EMBEDTRAIN_INLINE void set(int slot, float factor, bool is_centre) {
        factors[slot] = factor;
        counted[slot] = -1;
        flipped[slot] = is_centre ? std::numeric_limits<int32_t>::min() : 0;
    }
};

// Replaces logits by the derivatives of their losses, and adds the losses. The derivative of a negative's loss is
// factor * sigmoid(logit), and that of the centre's loss is -factor * sigmoid(-logit).
template <typename Vector>
EMBEDTRAIN_INLINE void slopes_in_place(float* logits, const Signs& signs, Loss<Vector>& loss) {
    const auto bits = [](const Vector& v) __attribute__((always_inline)) { return reinterpret_cast<Bits<Vector>>(v); };
    const auto values = [](const Bits<Vector>& b) __attribute__((always_inline)) {
        return reinterpret_cast<Vector>(b);
    };
    const Vector zero = {}, one = zero + 1.0f;
    Vector logit, factor;
    Bits<Vector> counted, flipped;
    load(logit, logits);
    load(factor, signs.factors);
    load_bits<Vector>(counted, signs.counted);
    load_bits<Vector>(flipped, signs.flipped);
    const Vector z = values(bits(logit) ^ flipped);
    const Vector below = values(bits(z) | std::numeric_limits<int32_t>::min());  // -|z|
    const Vector decay = exponential<Vector>(below < -kLargestLogit ? zero - kLargestLogit : below);
    const Vector probability = (z < zero ? decay : one) / (one + decay);
    const Vector linear = z <= zero ? zero : z;
    store(logits, values(bits(probability * factor) & counted));
    loss.product *= values((bits(one + decay) & counted) | (bits(one) & ~counted));
    loss.linear += values(bits(linear) & counted);
    if (++loss.power == kLargestPower) loss.settle();
}

// Calls add(a, column, values) with the sum over b of factors[a * a_stride + b * b_stride] * rows[b], for a < kSums,
// from column `d` on and kBlocks vectors at a time. Returns the first column that is not done.
template <typename Vector, int kSums, int kBlocks, typename Add>
EMBEDTRAIN_INLINE int64_t add_combinations(const float* factors, int a_stride, int b_stride, const float* const* rows,
                                           int num_rows, int64_t d, int64_t width, Add add) {
    constexpr int kStep = kLanes<Vector>;
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

template <typename Vector>
EMBEDTRAIN_INLINE void add_vector(float* row, const Vector& values) {
    Vector old;
    load(old, row);
    store(row, old + values);
}

// Adds a vector to a row from column `d` on; columns past the end of the row are ignored.
template <typename Vector>
EMBEDTRAIN_INLINE void add_vector_within(float* row, int64_t d, int64_t dim, const Vector& values) {
    if (d + kLanes<Vector> <= dim) {
        add_vector(row + d, values);
    } else if (d < dim) {
        float copy[kLanes<Vector>];
        store(copy, values);
        add_columns(row + d, copy, dim - d);
    }
}

template <typename Vector>
EMBEDTRAIN_INLINE void copy_row(float* target, const float* source, int64_t dim) {
    int64_t d = 0;
    for (; d + kLanes<Vector> <= dim; d += kLanes<Vector>) {
        Vector values;
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

template <typename Vector>
EMBEDTRAIN_INLINE void move_home(float* home, float* gathered, int64_t dim, int64_t width) {
    for (int64_t d = 0; d < width; d += kLanes<Vector>) {
        Vector values;
        load(values, gathered + d);
        add_vector_within(home, d, dim, values);
        store(gathered + d, Vector{});
    }
}

// The vectors of the words around a centre, and buffers for their gradients, targets and logits.
struct Workspace {
    int64_t width;  // dim rounded up to whole vectors; the columns past dim are zero
    int64_t reach, mask;
    float *contexts, *context_grads;  // [mask + 1, width]; position p lies at row p & mask
    float *targets;                   // [kTargets, width]
    float *logits;                    // [2 * reach, kSlots]; an even number of rows, since a vector may hold two
    const float** rows;               // [2 * reach]; the contexts of the centre
    float** grads;

    Workspace(const Block& block, int lanes) : width((block.dim + lanes - 1) / lanes * lanes), reach(0), mask(1) {
        for (int64_t i = 0; i < block.num_positions; ++i) {
            reach = std::max({reach, i - block.starts[i], block.stops[i] - 1 - i});
        }
        while (mask < 2 * reach) mask = 2 * mask + 1;
        const int64_t num_contexts = 2 * reach;
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

// Prefetches a row and its gradient. Every row takes the same number of turns, whether or not it begins at a cache
// line, so the processor predicts the end of the loop.
EMBEDTRAIN_INLINE void prefetch_pair(const Block& block, int64_t row) {
    const float* vector = block.vectors + row * block.dim;
    const float* grad = block.grad + row * block.dim;
    for (int64_t d = 0; d < block.dim + 15; d += 16) {
        const int64_t column = std::min(d, block.dim - 1);
        __builtin_prefetch(vector + column, 0);
        __builtin_prefetch(grad + column, 1);
    }
}

// The targets of a later centre, whose rows are prefetched one by one between the products of the current centre. All
// at once, they would fill the buffers of the innermost cache, and the processor would wait.
struct Ahead {
    const Block& block;
    const int64_t* rows;
    int64_t num_left;

    Ahead(const Block& of, int64_t centre) : block(of), rows(of.targets), num_left(0) {
        if (centre >= of.num_positions) return;
        rows += centre * of.num_targets;
        num_left = of.num_targets;
    }

    EMBEDTRAIN_INLINE void prefetch_one() {
        if (num_left > 0) prefetch_pair(block, rows[--num_left]);
    }

    EMBEDTRAIN_INLINE void prefetch_all() {
        while (num_left > 0) prefetch_one();
    }
};

// Adds the contribution of the targets to the gradients of kContexts contexts, from context `first` on.
template <typename Vector, int kContexts, int kBlocks>
EMBEDTRAIN_INLINE void add_to_contexts(const Workspace& work, int first, const float* const* targets) {
    const float* slopes = work.logits + first * kSlots;
    float* const* grads = work.grads + first;
    const auto add = [=](int a, int64_t d, const Vector& values) __attribute__((always_inline)) {
        add_vector(grads[a] + d, values);
    };
    const int64_t d = add_combinations<Vector, kContexts, kBlocks>(slopes, kSlots, 1, targets, kTargets, 0, work.width,
                                                                   add);
    add_combinations<Vector, kContexts, 1>(slopes, kSlots, 1, targets, kTargets, d, work.width, add);
}

// Adds the contribution of the contexts to the gradients of the targets. Targets are added one after the other, so a
// row that was drawn twice gets both sums.
template <typename Vector, int kBlocks>
EMBEDTRAIN_INLINE void add_to_targets(const Workspace& work, int num_contexts, int64_t dim, float* const* grads) {
    const auto add = [=](int a, int64_t d, const Vector& values) __attribute__((always_inline)) {
        add_vector(grads[a] + d, values);
    };
    const auto add_within = [=](int a, int64_t d, const Vector& values) __attribute__((always_inline)) {
        add_vector_within(grads[a], d, dim, values);
    };
    const int64_t d = add_combinations<Vector, kTargets, kBlocks>(work.logits, 1, kSlots, work.rows, num_contexts, 0,
                                                                  dim, add);
    add_combinations<Vector, kTargets, 1>(work.logits, 1, kSlots, work.rows, num_contexts, d, work.width, add_within);
}

// Adds loss and gradients of a centre's contexts against a group of up to kTargets targets, from target `first` on.
template <typename Vector, int kAtOnce, int kContextBlocks, int kTargetBlocks>
EMBEDTRAIN_INLINE void add_group(const Block& block, const Workspace& work, int64_t centre, int64_t first,
                                 int num_contexts, Ahead& ahead, Loss<Vector>& loss) {
    constexpr int kPerVector = kLanes<Vector> / kSlots;  // contexts whose logits fill a vector
    const int64_t dim = block.dim, width = work.width;
    const int64_t* rows = block.targets + centre * block.num_targets;
    Signs signs, last_signs;  // the last vector may hold one context only
    float* grads[kTargets];
    const float* targets[kTargets];
    for (int t = 0; t < kTargets; ++t) {
        const int64_t number = first + t;
        if (number < block.num_targets && (number == 0 || rows[number] != rows[0])) {
            const float factor = number == 0 ? -block.factor : block.factor;
            signs.set(t, factor, number == 0);
            signs.set(kSlots + t, factor, number == 0);
            last_signs.set(t, factor, number == 0);
        }
        // Slots past the last target use the last target's row with slopes of zero.
        const int64_t row = rows[std::min(number, block.num_targets - 1)];
        grads[t] = block.grad + row * dim;
        targets[t] = work.targets + t * width;
        copy_row<Vector>(work.targets + t * width, block.vectors + row * dim, dim);
    }
    int c = 0;
    for (; c + kAtOnce <= num_contexts; c += kAtOnce) {
        dot_products<Vector, kAtOnce>(work.rows + c, work.targets, width, work.logits + c * kSlots);
        ahead.prefetch_one();
    }
    for (; c + 2 <= num_contexts; c += 2) {
        dot_products<Vector, 2>(work.rows + c, work.targets, width, work.logits + c * kSlots);
        ahead.prefetch_one();
    }
    if (c < num_contexts) dot_products<Vector, 1>(work.rows + c, work.targets, width, work.logits + c * kSlots);
    for (c = 0; c < num_contexts; c += kPerVector) {
        const bool is_full = c + kPerVector <= num_contexts;
        slopes_in_place(work.logits + c * kSlots, is_full ? signs : last_signs, loss);
    }

    for (c = 0; c + kAtOnce <= num_contexts; c += kAtOnce) {
        add_to_contexts<Vector, kAtOnce, kContextBlocks>(work, c, targets);
        ahead.prefetch_one();
    }
    for (; c + 2 <= num_contexts; c += 2) {
        add_to_contexts<Vector, 2, kContextBlocks>(work, c, targets);
        ahead.prefetch_one();
    }
    if (c < num_contexts) add_to_contexts<Vector, 1, kContextBlocks>(work, c, targets);
    add_to_targets<Vector, kTargetBlocks>(work, num_contexts, dim, grads);
}

template <typename Vector, int kAtOnce, int kContextBlocks, int kTargetBlocks>
EMBEDTRAIN_INLINE double add_block(const Block& block) {
    const int64_t dim = block.dim, n = block.num_positions;
    const Workspace work(block, kLanes<Vector>);
    std::fill_n(block.grad, block.num_vectors * dim, 0.0f);
    Loss<Vector> loss;
    int64_t next = 0;
    for (int64_t centre = 0; centre <= n + work.reach; ++centre) {
        const int64_t leaving = centre - work.reach - 1;
        if (leaving >= 0 && leaving < n) {
            move_home<Vector>(block.grad + block.inputs[leaving] * dim,
                              work.context_grads + (leaving & work.mask) * work.width, dim, work.width);
        }
        for (; next < n && next <= centre + work.reach; ++next) {
            copy_row<Vector>(work.contexts + (next & work.mask) * work.width, block.vectors + block.inputs[next] * dim,
                             dim);
            if (next + kCentresAhead < n) prefetch_pair(block, block.inputs[next + kCentresAhead]);
        }
        if (centre >= n) continue;
        Ahead ahead(block, centre + kCentresAhead);
        int num_contexts = 0;
        for (int64_t p = block.starts[centre]; p < block.stops[centre]; ++p) {
            if (p == centre) continue;
            work.rows[num_contexts] = work.contexts + (p & work.mask) * work.width;
            work.grads[num_contexts++] = work.context_grads + (p & work.mask) * work.width;
        }
        for (int64_t first = 0; num_contexts > 0 && first < block.num_targets; first += kTargets) {
            add_group<Vector, kAtOnce, kContextBlocks, kTargetBlocks>(block, work, centre, first, num_contexts, ahead,
                                                                      loss);
        }
        ahead.prefetch_all();
    }
    loss.settle();
    return block.factor * loss.total;
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// Uses as many sums at once as fit into the 32 AVX-512 registers.
__attribute__((target("arch=x86-64-v4"))) double add_block_in_wide_registers(const Block& block) {
    return add_block<float16v, 4, 2, 2>(block);
}
#endif

EMBEDTRAIN_MULTIVERSION double add_block_in_any_registers(const Block& block) {
    return add_block<float8v, 2, 4, 2>(block);
}

// Counts indices and windows that are out of range.
EMBEDTRAIN_MULTIVERSION int64_t count_outside(const Block& block) {
    const uint64_t num_rows = static_cast<uint64_t>(block.num_vectors);  // as unsigned numbers, negative ones are large
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
