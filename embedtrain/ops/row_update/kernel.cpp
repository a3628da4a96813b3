// Updates rows by running moments of the gradient in one pass: SGD, Adagrad, RMSprop and Adam, with second moments per
// element or per row. Each touched row and its states are read once and written once.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "embedtrain.h"
#include "gradients.h"
#include "parallel.h"
#include "random.h"
#include "rows.h"

namespace {

using namespace embedtrain;

using Coefficients = EmbedtrainCoefficients;

enum class Second : int { kNone, kOfRow, kOfElement };

struct Update {
    void* weight;
    float *first, *second;
    const int64_t* rows;
    const RowGradients* gradients;
    const int64_t* rounding_keys;
    int64_t num_touched, dim;
    Coefficients coefficients;
    int num_parts;
};

EMBEDTRAIN_INLINE void store_row(float* row, const float* fresh, float factor, int64_t dim, const int64_t*) {
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) row[d] = factor * fresh[d];
}

EMBEDTRAIN_INLINE void store_row(uint16_t* row, const float* fresh, float factor, int64_t dim, const int64_t* key) {
    const uint64_t mixed = mix64(static_cast<uint64_t>(*key));
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) {
        const float value = factor * fresh[d];
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof(bits));
        // The sum has 64 bits, as in the reference, because a carry out of 32 bits must not wrap.
        row[d] = static_cast<uint16_t>((bits + (mix64(mixed + static_cast<uint64_t>(d)) & 0xFFFF)) >> 16);
    }
}

EMBEDTRAIN_INLINE float sum_of_squares(const float* values, int64_t dim) {
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < dim; ++d) squares += values[d] * values[d];
    return squares;
}

// Returns the factor that scales a row with this sum of squares down to a norm; 1 if its norm is not larger.
EMBEDTRAIN_INLINE float factor_to(float max_norm, float squares) {
    return max_norm / std::max(std::sqrt(squares), max_norm);
}

template <bool kHasFirst, Second kSecond, typename Stored>
EMBEDTRAIN_INLINE void update_row(const Update& u, int64_t i, const float* given, float* grad, float* fresh) {
    const Coefficients& c = u.coefficients;
    const int64_t dim = u.dim, at = u.rows[i];
    Stored* row = static_cast<Stored*>(u.weight) + at * dim;
    float factor = c.grad_factor;
    if (std::isfinite(c.max_row_grad_norm))
        factor *= factor_to(c.max_row_grad_norm, factor * factor * sum_of_squares(given, dim));
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t d = 0; d < dim; ++d) {
        grad[d] = factor * given[d] + c.coupled_decay * to_float(row[d]);
        if (kSecond == Second::kOfRow) squares += grad[d] * grad[d];
    }
    float denominator = 1.0f;
    if (kSecond == Second::kOfRow) {
        const float state = c.second_decay * u.second[at] + c.second_gain * (squares / static_cast<float>(dim));
        u.second[at] = state;
        denominator = std::sqrt(state) / c.second_correction + c.eps;
    }
    float* first = kHasFirst ? u.first + at * dim : nullptr;
    float* second = kSecond == Second::kOfElement ? u.second + at * dim : nullptr;
    float norm = 0.0f;
#pragma omp simd reduction(+ : norm)
    for (int64_t d = 0; d < dim; ++d) {
        float numerator = grad[d];
        if (kHasFirst) first[d] = numerator = first[d] + c.first_gain * (grad[d] - first[d]);
        float divisor = denominator;
        if (kSecond == Second::kOfElement) {
            second[d] = c.second_decay * second[d] + c.second_gain * grad[d] * grad[d];
            divisor = std::sqrt(second[d]) / c.second_correction + c.eps;
        }
        const float taken = c.step_size * numerator;
        fresh[d] = c.row_factor * to_float(row[d]) - (kSecond == Second::kNone ? taken : taken / divisor);
        norm += fresh[d] * fresh[d];
    }
    const float shrink = std::isfinite(c.max_norm) ? factor_to(c.max_norm, norm) : 1.0f;
    store_row(row, fresh, shrink, dim, u.rounding_keys ? u.rounding_keys + i : nullptr);
}

template <bool kHasFirst, Second kSecond, typename Stored>
EMBEDTRAIN_INLINE void update_rows(const Update& u, int part) {
    const int64_t dim = u.dim, row_bytes = dim * static_cast<int64_t>(sizeof(float));
    float* grad = static_cast<float*>(scratch(3, (2 + RowGradients::kMemoryRows) * row_bytes));
    float *fresh = grad + dim, *memory = fresh + dim;
    const Range range = range_of_part(u.num_touched, part, u.num_parts);
    for (int64_t begin = range.begin; begin < range.end; begin += kRowsAtOnce) {
        const Range block{begin, std::min(begin + kRowsAtOnce, range.end)};
        const float* grads = u.gradients->of(block.begin, block.end - block.begin, memory);
        for (int64_t i = block.begin; i < block.end; ++i) {
            if (i + kPrefetchAhead < range.end) {
                const int64_t ahead = u.rows[i + kPrefetchAhead];
                prefetch_row<1>(static_cast<Stored*>(u.weight) + ahead * dim,
                                dim * static_cast<int64_t>(sizeof(Stored)));
                if (kHasFirst) prefetch_row<1>(u.first + ahead * dim, row_bytes);
                if (kSecond == Second::kOfElement) prefetch_row<1>(u.second + ahead * dim, row_bytes);
                if (kSecond == Second::kOfRow) __builtin_prefetch(u.second + ahead, 1);
            }
            update_row<kHasFirst, kSecond, Stored>(u, i, grads + (i - block.begin) * dim, grad, fresh);
        }
    }
}

// target_clones works only on plain functions, so each template instance gets a named function.
#define EMBEDTRAIN_UPDATE(name, has_first, kind, Stored)                                      \
    EMBEDTRAIN_MULTIVERSION void name(const void* update, int part) {                         \
        update_rows<has_first, kind, Stored>(*static_cast<const Update*>(update), part);      \
    }

EMBEDTRAIN_UPDATE(plain_float32, false, Second::kNone, float)
EMBEDTRAIN_UPDATE(plain_bfloat16, false, Second::kNone, uint16_t)
EMBEDTRAIN_UPDATE(of_row_float32, false, Second::kOfRow, float)
EMBEDTRAIN_UPDATE(of_row_bfloat16, false, Second::kOfRow, uint16_t)
EMBEDTRAIN_UPDATE(of_element_float32, false, Second::kOfElement, float)
EMBEDTRAIN_UPDATE(of_element_bfloat16, false, Second::kOfElement, uint16_t)
EMBEDTRAIN_UPDATE(first_float32, true, Second::kNone, float)
EMBEDTRAIN_UPDATE(first_bfloat16, true, Second::kNone, uint16_t)
EMBEDTRAIN_UPDATE(first_of_row_float32, true, Second::kOfRow, float)
EMBEDTRAIN_UPDATE(first_of_row_bfloat16, true, Second::kOfRow, uint16_t)
EMBEDTRAIN_UPDATE(first_of_element_float32, true, Second::kOfElement, float)
EMBEDTRAIN_UPDATE(first_of_element_bfloat16, true, Second::kOfElement, uint16_t)

typedef void (*Work)(const void*, int);

// Indexed by [has a first moment][kind of the second moment][rows are bfloat16].
const Work kWork[2][3][2] = {
    {{plain_float32, plain_bfloat16},
     {of_row_float32, of_row_bfloat16},
     {of_element_float32, of_element_bfloat16}},
    {{first_float32, first_bfloat16},
     {first_of_row_float32, first_of_row_bfloat16},
     {first_of_element_float32, first_of_element_bfloat16}},
};

}  // namespace

void embedtrain_moment_update(void* weight, float* first, float* second, const EmbedtrainGradient* gradient,
                              float factor, const EmbedtrainDamping* damping, const int64_t* rounding_keys,
                              int second_kind, int64_t num_rows, int64_t dim, const Coefficients* coefficients,
                              int num_threads, int64_t* num_outside) {
    const int64_t num_touched = gradient->num_touched;
    const int num_parts = num_touched * dim < kSmallWork ? 1 : num_threads;
    const RowGradients gradients(*gradient, factor, damping, dim, num_parts);
    *num_outside = count_outside(gradient->rows, num_touched, num_rows) + gradients.num_outside();
    if (*num_outside) return;
    const Update u{weight, first, second, gradient->rows, &gradients, rounding_keys, num_touched, dim, *coefficients,
                   num_parts};
    run_parts(num_parts, kWork[first != nullptr][second_kind][rounding_keys != nullptr], &u);
}
