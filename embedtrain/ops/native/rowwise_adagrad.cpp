// Row-wise Adagrad in one pass: each touched row and its accumulator are read once and written once.

#include <cmath>
#include <cstdint>

#include "random.h"
#include "simd.h"

namespace {

using namespace embedtrain;

constexpr int64_t kPrefetchAhead = 8;  // rows; random rows are far apart, and the hardware cannot guess them

struct Hyperparameters {
    float lr, eps, weight_decay;
    bool decoupled;
};

EMBEDTRAIN_INLINE float to_float(float value) { return value; }

EMBEDTRAIN_INLINE float to_float(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
}

EMBEDTRAIN_INLINE float rounded(float value, float, uint64_t) { return value; }

EMBEDTRAIN_INLINE uint16_t rounded(float value, uint16_t, uint64_t random) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    // In 64 bits, as the reference: a carry out of 32 bits must not wrap.
    return static_cast<uint16_t>((bits + (random & 0xFFFF)) >> 16);
}

EMBEDTRAIN_INLINE void prefetch_row(const void* row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(row) + at, 1);
}

template <typename Stored>
EMBEDTRAIN_INLINE void update_rows(Stored* weight, float* accumulator, const int64_t* rows,
                                   const float* row_grad, int64_t num_touched, int64_t dim,
                                   const Hyperparameters& h, const int64_t* rounding_keys) {
    const float coupled = h.decoupled ? 0.0f : h.weight_decay;
    const float kept = h.decoupled ? 1.0f - h.lr * h.weight_decay : 1.0f;
    for (int64_t i = 0; i < num_touched; ++i) {
        if (i + kPrefetchAhead < num_touched) {
            const int64_t ahead = rows[i + kPrefetchAhead];
            prefetch_row(weight + ahead * dim, dim * static_cast<int64_t>(sizeof(Stored)));
            __builtin_prefetch(accumulator + ahead, 1);
        }
        Stored* row = weight + rows[i] * dim;
        const float* grad = row_grad + i * dim;
        float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
        for (int64_t d = 0; d < dim; ++d) {
            const float g = grad[d] + coupled * to_float(row[d]);
            squares += g * g;
        }
        const float state = accumulator[rows[i]] + squares / static_cast<float>(dim);
        accumulator[rows[i]] = state;
        const float rate = h.lr / (std::sqrt(state) + h.eps);
        const uint64_t key = rounding_keys ? mix64(static_cast<uint64_t>(rounding_keys[i])) : 0;
#pragma omp simd
        for (int64_t d = 0; d < dim; ++d) {
            const float old = to_float(row[d]);
            const float g = grad[d] + coupled * old;
            const float value = kept * old - rate * g;
            row[d] = rounded(value, row[d], sizeof(Stored) == 2 ? mix64(key + static_cast<uint64_t>(d)) : 0);
        }
    }
}

}  // namespace

extern "C" EMBEDTRAIN_MULTIVERSION void embedtrain_rowwise_adagrad_float32(
    float* weight, float* accumulator, const int64_t* rows, const float* row_grad, int64_t num_touched,
    int64_t dim, float lr, float eps, float weight_decay, int decoupled) {
    update_rows(weight, accumulator, rows, row_grad, num_touched, dim,
                Hyperparameters{lr, eps, weight_decay, decoupled != 0}, nullptr);
}

extern "C" EMBEDTRAIN_MULTIVERSION void embedtrain_rowwise_adagrad_bfloat16(
    uint16_t* weight, float* accumulator, const int64_t* rows, const float* row_grad, int64_t num_touched,
    int64_t dim, float lr, float eps, float weight_decay, int decoupled,
    const int64_t* rounding_keys) {
    update_rows(weight, accumulator, rows, row_grad, num_touched, dim,
                Hyperparameters{lr, eps, weight_decay, decoupled != 0}, rounding_keys);
}
