// Damps gradients of rows along a few directions of high curvature, a block of rows that fits into the cache at a time.

#include <algorithm>
#include <cstdint>

#include "embedtrain.h"
#include "parallel.h"
#include "rows.h"
#include "simd.h"

namespace {

using namespace embedtrain;

constexpr int64_t kAtOnce = 4;  // directions per pass over a row
constexpr int64_t kBlock = 32;  // rows per block

struct Damping {
    const float* grad;
    const int64_t* tables;
    const float* times;
    const float *curvatures, *directions;
    int64_t num_rows, dim, num_directions;
    float* damped;
    int num_parts;
};

// (1 - exp(-x)) / x - 1. For small x the quotient would lose all digits, so use its series. For x above 80 the
// exponential is far below the rounding error of 1.
EMBEDTRAIN_INLINE float excess(float x) {
    const float series = x * (-1.0f / 2 + x * (1.0f / 6 + x * (-1.0f / 24 + x * (1.0f / 120))));
    const float divisor = x > 0.125f ? x : 0.125f;
    const float quotient = (1.0f - exponential(x < 80.0f ? -x : -80.0f)) / divisor - 1.0f;
    return x < 0.125f ? series : quotient;
}

template <typename Vector>
EMBEDTRAIN_INLINE void add_products(const float* grad, const float* vectors, int64_t dim, int64_t d, Vector* sums) {
    Vector g;
    load(g, grad + d);
    EMBEDTRAIN_UNROLL
    for (int64_t k = 0; k < kAtOnce; ++k) {
        Vector v;
        load(v, vectors + k * dim + d);
        sums[k] += g * v;
    }
}

template <typename Vector>
EMBEDTRAIN_INLINE void add_directions(const float* factors, const float* vectors, int64_t dim, int64_t d,
                                      float* damped) {
    Vector sum;
    load(sum, damped + d);
    EMBEDTRAIN_UNROLL
    for (int64_t k = 0; k < kAtOnce; ++k) {
        Vector v;
        load(v, vectors + k * dim + d);
        sum += factors[k] * v;
    }
    store(damped + d, sum);
}

// Sums the products with four directions in parallel. One after the other, each addition would wait for the last one.
EMBEDTRAIN_INLINE void damp_along_four(const float* grad, const float* vectors, const float* excesses, int64_t dim,
                                       float* damped) {
    const int64_t eights = dim - dim % 8, fours = dim - dim % 4;
    float8v wide[kAtOnce] = {};
    for (int64_t d = 0; d < eights; d += 8) add_products(grad, vectors, dim, d, wide);
    float4v halves[kAtOnce];
    EMBEDTRAIN_UNROLL
    for (int64_t k = 0; k < kAtOnce; ++k) {
        float4v parts[2];
        std::memcpy(parts, &wide[k], sizeof(parts));
        halves[k] = parts[0] + parts[1];
    }
    if (eights < fours) add_products(grad, vectors, dim, eights, halves);
    float factors[kAtOnce];
    EMBEDTRAIN_UNROLL
    for (int64_t k = 0; k < kAtOnce; ++k) {
        float product = sum(halves[k]);
        for (int64_t d = fours; d < dim; ++d) product += grad[d] * vectors[k * dim + d];
        factors[k] = product * excesses[k];
    }
    for (int64_t d = 0; d < eights; d += 8) add_directions<float8v>(factors, vectors, dim, d, damped);
    if (eights < fours) add_directions<float4v>(factors, vectors, dim, eights, damped);
    for (int64_t d = fours; d < dim; ++d) {
        EMBEDTRAIN_UNROLL
        for (int64_t k = 0; k < kAtOnce; ++k) damped[d] += factors[k] * vectors[k * dim + d];
    }
}

EMBEDTRAIN_INLINE void damp_along_one(const float* grad, const float* vector, float excess, int64_t dim,
                                      float* damped) {
    float product = 0.0f;
#pragma omp simd reduction(+ : product)
    for (int64_t d = 0; d < dim; ++d) product += grad[d] * vector[d];
    product *= excess;
#pragma omp simd
    for (int64_t d = 0; d < dim; ++d) damped[d] += product * vector[d];
}

// Damps a block of rows along `num` directions, at most kAtOnce, from `direction` on.
EMBEDTRAIN_INLINE void damp_block(const Damping& u, Range rows, int64_t direction, int64_t num) {
    // Computes the exponentials of the whole block in one loop, because a row alone has too few to fill the pipeline.
    float excesses[kBlock * kAtOnce] = {};
    for (int64_t i = rows.begin; i < rows.end; ++i) {
        const float* curvatures = u.curvatures + u.tables[i] * u.num_directions + direction;
        float* own = excesses + (i - rows.begin) * kAtOnce;
        for (int64_t k = 0; k < num; ++k) own[k] = u.times[i] * std::max(curvatures[k], 0.0f);
    }
#pragma omp simd
    for (int64_t k = 0; k < kBlock * kAtOnce; ++k) excesses[k] = excess(excesses[k]);
    for (int64_t i = rows.begin; i < rows.end; ++i) {
        const float* grad = u.grad + i * u.dim;
        const float* own = excesses + (i - rows.begin) * kAtOnce;
        const float* vectors = u.directions + (u.tables[i] * u.num_directions + direction) * u.dim;
        float* damped = u.damped + i * u.dim;
        if (num == kAtOnce) {
            damp_along_four(grad, vectors, own, u.dim, damped);
            continue;
        }
        for (int64_t k = 0; k < num; ++k) damp_along_one(grad, vectors + k * u.dim, own[k], u.dim, damped);
    }
}

EMBEDTRAIN_MULTIVERSION void damp_part(const void* arguments, int part) {
    const Damping& u = *static_cast<const Damping*>(arguments);
    const Range range = range_of_part(u.num_rows, part, u.num_parts);
    for (int64_t begin = range.begin; begin < range.end; begin += kBlock) {
        const Range block{begin, std::min(begin + kBlock, range.end)};
        const int64_t place = block.begin * u.dim, num_values = (block.end - block.begin) * u.dim;
        std::memcpy(u.damped + place, u.grad + place, static_cast<size_t>(num_values) * sizeof(float));
        for (int64_t j = 0; j < u.num_directions; j += kAtOnce) {
            damp_block(u, block, j, std::min(kAtOnce, u.num_directions - j));
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
