// Row-wise Adagrad in one pass: each touched row and its accumulator are read once and written once.

#include <cmath>
#include <cstdint>

#include "parallel.h"
#include "random.h"
#include "rows.h"

namespace {

using namespace embedtrain;

struct Hyperparameters {
    float lr, eps, weight_decay;
    bool decoupled;
};

EMBEDTRAIN_INLINE float rounded(float value, float, uint64_t) { return value; }

EMBEDTRAIN_INLINE uint16_t rounded(float value, uint16_t, uint64_t random) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    // In 64 bits, as the reference: a carry out of 32 bits must not wrap.
    return static_cast<uint16_t>((bits + (random & 0xFFFF)) >> 16);
}

struct Update {
    void* weight;
    float* accumulator;
    const int64_t* rows;
    const float* row_grad;
    int64_t num_touched, dim;
    Hyperparameters hyperparameters;
    const int64_t* rounding_keys;
    int num_parts;
};

template <typename Stored>
EMBEDTRAIN_INLINE void update_rows(const Update& u, int part) {
    Stored* weight = static_cast<Stored*>(u.weight);
    const Hyperparameters h = u.hyperparameters;
    const int64_t dim = u.dim;
    const float coupled = h.decoupled ? 0.0f : h.weight_decay;
    const float kept = h.decoupled ? 1.0f - h.lr * h.weight_decay : 1.0f;
    const Range range = range_of_part(u.num_touched, part, u.num_parts);
    for (int64_t i = range.begin; i < range.end; ++i) {
        if (i + kPrefetchAhead < range.end) {
            const int64_t ahead = u.rows[i + kPrefetchAhead];
            prefetch_row<1>(weight + ahead * dim, dim * static_cast<int64_t>(sizeof(Stored)));
            __builtin_prefetch(u.accumulator + ahead, 1);
        }
        Stored* row = weight + u.rows[i] * dim;
        const float* grad = u.row_grad + i * dim;
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < dim; ++d) {
            const float g = grad[d] + coupled * to_float(row[d]);
            squares += g * g;
        }
        const float state = u.accumulator[u.rows[i]] + squares / static_cast<float>(dim);
        u.accumulator[u.rows[i]] = state;
        const float rate = h.lr / (std::sqrt(state) + h.eps);
        const uint64_t key = u.rounding_keys ? mix64(static_cast<uint64_t>(u.rounding_keys[i])) : 0;
#pragma omp simd
        for (int64_t d = 0; d < dim; ++d) {
            const float old = to_float(row[d]);
            const float g = grad[d] + coupled * old;
            const float value = kept * old - rate * g;
            row[d] = rounded(value, row[d], sizeof(Stored) == 2 ? mix64(key + static_cast<uint64_t>(d)) : 0);
        }
    }
}

EMBEDTRAIN_MULTIVERSION void update_float32(const void* u, int part) {
    update_rows<float>(*static_cast<const Update*>(u), part);
}

EMBEDTRAIN_MULTIVERSION void update_bfloat16(const void* u, int part) {
    update_rows<uint16_t>(*static_cast<const Update*>(u), part);
}

}  // namespace

// rounding_keys: [num_touched] for bfloat16 weights; null for float32 ones. num_outside: how many of the rows are
// none; where there are any, nothing is updated.
extern "C" void embedtrain_rowwise_adagrad(void* weight, float* accumulator, const int64_t* rows,
                                           const float* row_grad, int64_t num_touched, int64_t num_rows, int64_t dim,
                                           float lr, float eps, float weight_decay, int decoupled,
                                           const int64_t* rounding_keys, int num_threads,
                                           int64_t* num_outside) {
    int64_t outside = 0;
    for (int64_t i = 0; i < num_touched; ++i) outside += rows[i] < 0 || rows[i] >= num_rows;
    *num_outside = outside;
    if (outside) return;
    const int num_parts = num_touched * dim < kSmallWork ? 1 : num_threads;
    const Update u{weight, accumulator, rows, row_grad, num_touched, dim,
                   Hyperparameters{lr, eps, weight_decay, decoupled != 0}, rounding_keys, num_parts};
    run_parts(num_parts, rounding_keys ? update_bfloat16 : update_float32, &u);
}
