// Damps gradients of rows along a few directions of high curvature. Each row is read once and written once.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "embedtrain.h"
#include "parallel.h"
#include "rows.h"

namespace {

using namespace embedtrain;

constexpr int64_t kAtOnce = 4;  // directions per pass over a row

struct Damping {
    const float* grad;
    const int64_t* tables;
    const float* times;
    const float *curvatures, *directions;
    int64_t num_rows, dim, num_directions;
    float* damped;
    int num_parts;
};

// (1 - exp(-x)) / x - 1. For small x, which most rows have, the quotient would lose all digits, so use its series.
EMBEDTRAIN_INLINE float excess(float x) {
    if (!(x > 0.0f)) return 0.0f;
    if (x < 0.125f) return x * (-1.0f / 2 + x * (1.0f / 6 + x * (-1.0f / 24 + x * (1.0f / 120))));
    return (1.0f - std::exp(-x)) / x - 1.0f;
}

template <int64_t kDirections>
EMBEDTRAIN_INLINE void damp_along(const float* grad, const float* vectors, const float* curvatures, float time,
                                  int64_t dim, float* damped) {
    float along[kDirections] = {};
    for (int64_t j = 0; j < kDirections; ++j) {
        const float* vector = vectors + j * dim;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < dim; ++d) sum += grad[d] * vector[d];
        along[j] = sum * excess(time * curvatures[j]);
    }
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) {
        float added = 0.0f;
        for (int64_t j = 0; j < kDirections; ++j) added += along[j] * vectors[j * dim + d];
        damped[d] += added;
    }
}

EMBEDTRAIN_MULTIVERSION void damp_part(const void* arguments, int part) {
    const Damping& u = *static_cast<const Damping*>(arguments);
    const Range range = range_of_part(u.num_rows, part, u.num_parts);
    for (int64_t i = range.begin; i < range.end; ++i) {
        const float *grad = u.grad + i * u.dim, time = u.times[i];
        float* damped = u.damped + i * u.dim;
        std::memcpy(damped, grad, static_cast<size_t>(u.dim) * sizeof(float));
        if (time == 0.0f) continue;
        const int64_t first = u.tables[i] * u.num_directions;
        const float *vectors = u.directions + first * u.dim, *curvatures = u.curvatures + first;
        int64_t j = 0;
        for (; j + kAtOnce <= u.num_directions; j += kAtOnce) {
            damp_along<kAtOnce>(grad, vectors + j * u.dim, curvatures + j, time, u.dim, damped);
        }
        for (; j < u.num_directions; ++j) {
            damp_along<1>(grad, vectors + j * u.dim, curvatures + j, time, u.dim, damped);
        }
    }
}

}  // namespace

void embedtrain_damp_rows(const float* grad, const int64_t* tables, const float* times, const float* curvatures,
                          const float* directions, int64_t num_rows, int64_t dim, int64_t num_tables,
                          int64_t num_directions, float* damped, int num_threads, int64_t* num_outside) {
    int64_t outside = 0;
    for (int64_t i = 0; i < num_rows; ++i) outside += tables[i] < 0 || tables[i] >= num_tables;
    *num_outside = outside;
    if (outside) return;
    const int num_parts = num_rows * dim < kSmallWork ? 1 : num_threads;
    const Damping u{grad, tables, times, curvatures, directions, num_rows, dim, num_directions, damped, num_parts};
    run_parts(num_parts, damp_part, &u);
}
