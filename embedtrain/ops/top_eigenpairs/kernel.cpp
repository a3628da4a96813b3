// Power iteration for the largest eigenvalues of symmetric matrices, in float64. See top_eigenpairs/reference.py.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "embedtrain.h"
#include "parallel.h"
#include "simd.h"

namespace {

using namespace embedtrain;

constexpr int64_t kAtOnce = 4;  // vectors that a product reads together
constexpr int kNumTurns = 8, kProducts = 4;  // products per turn, between which vectors are not made orthogonal

typedef double double4v __attribute__((vector_size(32)));

// product = matrix * vectors, with the columns of `vectors` interleaved: [dim, kAtOnce].
EMBEDTRAIN_INLINE void multiply(const double* matrix, const double4v* vectors, int64_t dim, double4v* product) {
    constexpr int64_t kHigh = 4;  // sums that do not wait for each other
    for (int64_t i = 0; i < dim; i += kHigh) {
        const int64_t high = std::min(kHigh, dim - i);
        const double* rows[kHigh];
        double4v sums[kHigh];
        EMBEDTRAIN_UNROLL
        for (int64_t r = 0; r < kHigh; ++r) {
            rows[r] = matrix + std::min(i + r, dim - 1) * dim;
            sums[r] = double4v{};
        }
        for (int64_t j = 0; j < dim; ++j) {
            EMBEDTRAIN_UNROLL
            for (int64_t r = 0; r < kHigh; ++r) sums[r] += rows[r][j] * vectors[j];
        }
        for (int64_t r = 0; r < high; ++r) product[i + r] = sums[r];
    }
}

// Vector `number` of vectors that are stored kAtOnce at a time: [num_vectors / kAtOnce, dim, kAtOnce].
struct Column {
    double* first;
    EMBEDTRAIN_INLINE double& operator[](int64_t i) const { return first[i * kAtOnce]; }
};

EMBEDTRAIN_INLINE Column column(double4v* vectors, int64_t dim, int64_t number) {
    return {reinterpret_cast<double*>(vectors + number / kAtOnce * dim) + number % kAtOnce};
}

EMBEDTRAIN_INLINE double dot(const Column& a, const Column& b, int64_t dim) {
    double sums[4] = {};
    for (int64_t i = 0; i < dim; ++i) sums[i % 4] += a[i] * b[i];
    return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// Makes the vectors orthonormal in order. Of a vector that nearly lies in the span of those before it, rounding leaves
// some direction, from which later turns find the eigenvector. Zeros stay zeros.
EMBEDTRAIN_INLINE void make_orthonormal(double4v* vectors, int64_t dim, int64_t number) {
    for (int64_t v = 0; v < number; ++v) {
        const Column own = column(vectors, dim, v);
        // A pass leaves rounding errors of the length that the vector had before, so three passes of unit length.
        for (int pass = 0; pass < 3; ++pass) {
            for (int64_t u = 0; u < v; ++u) {
                const Column other = column(vectors, dim, u);
                const double share = dot(own, other, dim);
                for (int64_t i = 0; i < dim; ++i) own[i] -= share * other[i];
            }
            const double norm = std::sqrt(dot(own, own, dim));
            const double scale = norm > 0.0 ? 1.0 / norm : 0.0;
            for (int64_t i = 0; i < dim; ++i) own[i] *= scale;
        }
    }
}

EMBEDTRAIN_MULTIVERSION void find_pairs(const float* matrix, int64_t dim, int64_t number, float* values,
                                        float* vectors) {
    const int64_t num_groups = (number + kAtOnce - 1) / kAtOnce, num_values = num_groups * kAtOnce;
    double* exact = static_cast<double*>(scratch(0, dim * dim * 8));
    double4v* own = static_cast<double4v*>(scratch(1, 2 * num_groups * dim * 32));
    double4v* next = own + num_groups * dim;
    double trace = 0.0;
    for (int64_t i = 0; i < dim; ++i) trace += matrix[i * dim + i];
    const double scale = 1.0 / std::max(trace, 1e-300);  // so that powers neither overflow nor vanish
    for (int64_t i = 0; i < dim * dim; ++i) exact[i] = scale * matrix[i];
    for (int64_t v = 0; v < num_values; ++v) {
        const Column start = column(own, dim, v);
        for (int64_t i = 0; i < dim; ++i) {
            const double angle = (static_cast<double>(i) + 0.5) * (static_cast<double>(v) + 0.25);
            start[i] = v < number ? std::cos(angle) : 0.0;
        }
    }
    for (int turn = 0; turn < kNumTurns; ++turn) {
        for (int power = 0; power < kProducts; ++power) {
            for (int64_t g = 0; g < num_groups; ++g) multiply(exact, own + g * dim, dim, next + g * dim);
            std::swap(own, next);
        }
        make_orthonormal(own, dim, number);
    }
    for (int64_t g = 0; g < num_groups; ++g) multiply(exact, own + g * dim, dim, next + g * dim);
    for (int64_t v = 0; v < number; ++v) {
        const Column vector = column(own, dim, v);
        values[v] = static_cast<float>(dot(vector, column(next, dim, v), dim) / scale);
        for (int64_t i = 0; i < dim; ++i) vectors[v * dim + i] = static_cast<float>(vector[i]);
    }
}

}  // namespace

void embedtrain_top_eigenpairs(const float* matrices, int64_t num_matrices, int64_t dim, int64_t number, float* values,
                               float* vectors) {
    for (int64_t m = 0; m < num_matrices; ++m) {
        find_pairs(matrices + m * dim * dim, dim, number, values + m * number, vectors + m * number * dim);
    }
}
