// Updates rows by row-wise Adagrad in one pass: each touched row and its accumulator are read once and written once. A
// variant also sums the gradients of duplicates in this pass.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "bags.h"
#include "embedtrain.h"
#include "gradients.h"
#include "random.h"

namespace {

using namespace embedtrain;

struct Hyperparameters {
    float lr, eps, weight_decay;
    bool decoupled;
    float max_norm;  // infinity for no limit
};

EMBEDTRAIN_INLINE float rounded(float value, float, uint64_t) { return value; }

EMBEDTRAIN_INLINE uint16_t rounded(float value, uint16_t, uint64_t random) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    // The sum has 64 bits, as in the reference, because a carry out of 32 bits must not wrap.
    return static_cast<uint16_t>((bits + (random & 0xFFFF)) >> 16);
}

// Updates one row by its summed gradient, `factor * grad`. kDim: the dim as a compile-time constant, or 0 for any dim.
template <int kDim, typename Stored>
EMBEDTRAIN_INLINE void update_row(const Hyperparameters& h, int64_t given_dim, Stored* row, float* accumulator,
                                  const float* grad, float factor, uint64_t key) {
    const int64_t dim = kDim ? kDim : given_dim;
    const float coupled = h.decoupled ? 0.0f : h.weight_decay;
    const float kept = h.decoupled ? 1.0f - h.lr * h.weight_decay : 1.0f;
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < dim; ++d) {
        const float g = factor * grad[d] + coupled * to_float(row[d]);
        squares += g * g;
    }
    const float state = *accumulator + squares / static_cast<float>(dim);
    *accumulator = state;
    const float rate = h.lr / (std::sqrt(state) + h.eps);
    float shrink = 1.0f;
    if (std::isfinite(h.max_norm)) {
        // The row is in the cache, so computing its new values twice is cheaper than storing them.
        float norm = 0.0f;
#pragma omp simd reduction(+ : norm)
        for (int64_t d = 0; d < dim; ++d) {
            const float old = to_float(row[d]);
            const float value = kept * old - rate * (factor * grad[d] + coupled * old);
            norm += value * value;
        }
        shrink = h.max_norm / std::max(std::sqrt(norm), h.max_norm);
    }
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) {
        const float old = to_float(row[d]);
        const float g = factor * grad[d] + coupled * old;
        const float value = shrink * (kept * old - rate * g);
        row[d] = rounded(value, row[d], sizeof(Stored) == 2 ? mix64(key + static_cast<uint64_t>(d)) : 0);
    }
}

struct Update {
    void* weight;
    float* accumulator;
    const int64_t* rows;
    const RowGradients* gradients;
    int64_t num_touched, dim;
    Hyperparameters hyperparameters;
    const int64_t* rounding_keys;
    int num_parts;
};

template <int kDim, typename Stored>
EMBEDTRAIN_INLINE void update_rows(const Update& u, int part) {
    Stored* weight = static_cast<Stored*>(u.weight);
    const int64_t dim = kDim ? kDim : u.dim;
    const int64_t row_bytes = dim * static_cast<int64_t>(sizeof(Stored)), ahead = rows_ahead_to_update(row_bytes);
    const Range range = range_of_part(u.num_touched, part, u.num_parts);
    float* memory = static_cast<float*>(scratch(3, RowGradients::kMemoryRows * dim * 4));
    for (int64_t begin = range.begin; begin < range.end; begin += kRowsAtOnce) {
        const Range block{begin, std::min(begin + kRowsAtOnce, range.end)};
        const float* grads = u.gradients->of(block.begin, block.end - block.begin, memory);
        for (int64_t i = block.begin; i < block.end; ++i) {
            if (i + ahead < range.end) {
                prefetch_row<1>(weight + u.rows[i + ahead] * dim, row_bytes);
                __builtin_prefetch(u.accumulator + u.rows[i + ahead], 1);
            }
            const int64_t row = u.rows[i];
            const uint64_t key = u.rounding_keys ? mix64(static_cast<uint64_t>(u.rounding_keys[i])) : 0;
            update_row<kDim>(u.hyperparameters, dim, weight + row * dim, u.accumulator + row,
                             grads + (i - block.begin) * dim, 1.0f, key);
        }
    }
}

// An update that sums the gradients of duplicates.
struct TermsUpdate {
    float *weight, *accumulator;
    const uint64_t* words;  // sorted; row << term_bits | term
    int64_t num_values, dim;
    const GradientTerm* terms;
    int term_bits;
    float factor;
    Hyperparameters hyperparameters;
    int num_parts;
};

// Returns the first value at or after `at` that begins a new row.
EMBEDTRAIN_INLINE int64_t next_row(const TermsUpdate& u, int64_t at) {
    while (at > 0 && at < u.num_values && u.words[at] >> u.term_bits == u.words[at - 1] >> u.term_bits) ++at;
    return at;
}

template <int kDim>
EMBEDTRAIN_INLINE void update_by_terms(const TermsUpdate& u, int part) {
    const int64_t dim = kDim ? kDim : u.dim, row_bytes = dim * 4;
    const int64_t ahead = rows_ahead_to_update(row_bytes), num_values = u.num_values;
    const uint64_t* words = u.words;
    const GradientTerm* terms = u.terms;
    const int term_bits = u.term_bits;
    const uint64_t mask = (1ull << term_bits) - 1;
    float* summed = static_cast<float*>(scratch(3, row_bytes));
    const Range values = range_of_part(num_values, part, u.num_parts);
    const int64_t end = next_row(u, values.end);
    int64_t asked_for = next_row(u, values.begin);
    for (int64_t first = asked_for; first < end;) {
        const uint64_t row = words[first] >> term_bits;
        int64_t last = first + 1;
        while (last < end && words[last] >> term_bits == row) ++last;
        for (const int64_t until = std::min(last + ahead, num_values); asked_for < until; ++asked_for) {
            if (asked_for + ahead < num_values) __builtin_prefetch(terms + (words[asked_for + ahead] & mask));
            prefetch_row<0>(terms[words[asked_for] & mask].row, row_bytes);
            const uint64_t next = words[asked_for] >> term_bits;
            if (asked_for > 0 && words[asked_for - 1] >> term_bits == next) continue;
            prefetch_row<1>(u.weight + next * dim, row_bytes);
            __builtin_prefetch(u.accumulator + next, 1);
        }
        const GradientTerm& only = terms[words[first] & mask];
        const float* grad = only.row;
        float factor = only.factor * u.factor;
        if (last - first > 1) {
            sum_terms([=](int64_t i) __attribute__((always_inline)) { return terms[words[first + i] & mask]; },
                      last - first, u.factor, dim, summed);
            grad = summed;
            factor = 1.0f;
        }
        update_row<kDim>(u.hyperparameters, dim, u.weight + row * dim, u.accumulator + row, grad, factor, 0);
        first = last;
    }
}

EMBEDTRAIN_MULTIVERSION void update_float32(const void* update, int part) {
    const Update& u = *static_cast<const Update*>(update);
    switch (u.dim) {
        case 32: return update_rows<32, float>(u, part);
        case 64: return update_rows<64, float>(u, part);
        case 128: return update_rows<128, float>(u, part);
        default: return update_rows<0, float>(u, part);
    }
}

EMBEDTRAIN_MULTIVERSION void update_bfloat16(const void* u, int part) {
    update_rows<0, uint16_t>(*static_cast<const Update*>(u), part);
}

EMBEDTRAIN_MULTIVERSION void update_terms(const void* update, int part) {
    const TermsUpdate& u = *static_cast<const TermsUpdate*>(update);
    switch (u.dim) {
        case 32: return update_by_terms<32>(u, part);
        case 64: return update_by_terms<64>(u, part);
        case 128: return update_by_terms<128>(u, part);
        default: return update_by_terms<0>(u, part);
    }
}

}  // namespace

void embedtrain_rowwise_adagrad(void* weight, float* accumulator, const EmbedtrainGradient* gradient, float factor,
                                const EmbedtrainDamping* damping, int64_t num_rows, int64_t dim, float lr, float eps,
                                float weight_decay, int decoupled, float max_norm, const int64_t* rounding_keys,
                                int num_threads, int64_t* num_outside) {
    const int64_t num_touched = gradient->num_touched;
    const int num_parts = num_touched * dim < kSmallWork ? 1 : num_threads;
    const RowGradients gradients(*gradient, factor, damping, dim, num_parts);
    *num_outside = count_outside(gradient->rows, num_touched, num_rows) + gradients.num_outside();
    if (*num_outside) return;
    const Update u{weight, accumulator, gradient->rows, &gradients, num_touched, dim,
                   Hyperparameters{lr, eps, weight_decay, decoupled != 0, max_norm}, rounding_keys, num_parts};
    run_parts(num_parts, rounding_keys ? update_bfloat16 : update_float32, &u);
}

void embedtrain_rowwise_adagrad_of_terms(float* weight, float* accumulator, int64_t dim,
                                         const uint64_t* words, int64_t num_values, int term_bits,
                                         const EmbedtrainFeature* features, int64_t num_features, float factor,
                                         float lr, float eps, float weight_decay, int decoupled, float max_norm,
                                         int num_threads, int64_t* num_outside) {
    const int num_parts = num_values * dim < kSmallWork ? 1 : num_threads;
    const Bags bags{features, num_features};
    Outside outside{0};
    const TermsUpdate u{weight, accumulator, words, num_values, dim,
                        find_terms(bags, dim, false, num_parts, &outside), term_bits, factor,
                        Hyperparameters{lr, eps, weight_decay, decoupled != 0, max_norm}, num_parts};
    *num_outside = outside;
    if (!outside) run_parts(num_parts, update_terms, &u);
}
