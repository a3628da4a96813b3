// Portable vectors (GCC and Clang extensions) and the arithmetic that the kernels share.
//
// A 16-lane vector compiles to one AVX-512 register, two AVX registers or four SSE registers, depending on the
// function's target. EMBEDTRAIN_MULTIVERSION compiles a function for each target and selects one at load time.

#pragma once

#include <cstdint>
#include <cstring>

#define EMBEDTRAIN_INLINE inline __attribute__((always_inline))

// Unrolls a loop over an array of vectors, so that the array stays in registers. An array that is indexed by a variable
// lies in memory.
#define EMBEDTRAIN_UNROLL _Pragma("GCC unroll 24")

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EMBEDTRAIN_MULTIVERSION \
    __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EMBEDTRAIN_MULTIVERSION
#endif

namespace embedtrain {

typedef float float16v __attribute__((vector_size(64)));
typedef float float8v __attribute__((vector_size(32)));  // one AVX2 register; wider vectors would spill to memory
typedef float float4v __attribute__((vector_size(16)));
typedef int32_t int16v __attribute__((vector_size(64)));
typedef int32_t int8v __attribute__((vector_size(32)));

template <typename Vector>
EMBEDTRAIN_INLINE void load(Vector& vector, const float* source) {
    std::memcpy(&vector, source, sizeof(Vector));
}

template <typename Vector>
EMBEDTRAIN_INLINE void store(float* target, const Vector& vector) {
    std::memcpy(target, &vector, sizeof(Vector));
}

EMBEDTRAIN_INLINE float sum(const float4v& v) { return (v[0] + v[2]) + (v[1] + v[3]); }

EMBEDTRAIN_INLINE float sum(const float16v& v) {
    float4v quarters[4];
    std::memcpy(quarters, &v, sizeof(v));
    return sum((quarters[0] + quarters[2]) + (quarters[1] + quarters[3]));
}

// Returns 2^n for an integer n in [-126, 127].
EMBEDTRAIN_INLINE float power_of_two(float n) {
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return power;
}

EMBEDTRAIN_INLINE float8v power_of_two(const float8v& n) {
    return reinterpret_cast<float8v>((__builtin_convertvector(n, int8v) + 127) << 23);
}

EMBEDTRAIN_INLINE float16v power_of_two(const float16v& n) {
    return reinterpret_cast<float16v>((__builtin_convertvector(n, int16v) + 127) << 23);
}

// e^x for x in [-87, 88], relative error below 3e-7: 2^n times a degree-6 Taylor polynomial on |r| <= ln(2)/2. `Value`
// is float or a vector of floats.
template <typename Value>
EMBEDTRAIN_INLINE Value exponential(const Value& x) {
    constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: a sum with it has no bits after the point
    const Value n = (x * 1.44269504f + kRounder) - kRounder;
    const Value r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Value p = r * (1.0f / 720.0f) + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * power_of_two(n);
}

// log(1 + u) for u in [0, 1], absolute error below 1e-7: the series of 2 atanh(u / (2 + u)).
EMBEDTRAIN_INLINE float log_one_plus(float u) {
    const float s = u / (2.0f + u);
    const float q = s * s;
    float p = 1.0f / 13.0f;
    p = p * q + 1.0f / 11.0f;
    p = p * q + 1.0f / 9.0f;
    p = p * q + 1.0f / 7.0f;
    p = p * q + 1.0f / 5.0f;
    p = p * q + 1.0f / 3.0f;
    p = p * q + 1.0f;
    return 2.0f * s * p;
}

}  // namespace embedtrain
