// Rows of float32 or bfloat16, read as float32.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace embedtrain {

constexpr int64_t kPrefetchAhead = 12;  // rows; the hardware cannot predict random rows
constexpr int64_t kSmallWork = 1 << 17;  // values; with fewer, waking a thread costs more than it saves

typedef uint16_t uint16x8 __attribute__((vector_size(16)));
typedef uint32_t uint32x8 __attribute__((vector_size(32)));

EMBEDTRAIN_INLINE float to_float(float value) { return value; }

EMBEDTRAIN_INLINE float to_float(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
}

EMBEDTRAIN_INLINE void load_row(float8v& vector, const float* source) { load(vector, source); }

EMBEDTRAIN_INLINE void load_row(float8v& vector, const uint16_t* source) {
    uint16x8 bits;
    std::memcpy(&bits, source, sizeof(bits));
    const uint32x8 wide = __builtin_convertvector(bits, uint32x8) << 16;
    std::memcpy(&vector, &wide, sizeof(wide));
}

// Returns how many of `num` values are not in [0, bound).
inline int64_t count_outside(const int64_t* values, int64_t num, int64_t bound) {
    int64_t outside = 0;
    for (int64_t i = 0; i < num; ++i) outside += values[i] < 0 || values[i] >= bound;
    return outside;
}

// Prefetch distance for reading rows, in rows. It keeps as many bytes in flight as one core sustains (measured).
EMBEDTRAIN_INLINE int64_t rows_ahead_to_read(int64_t row_bytes) {
    return std::clamp<int64_t>(10240 / row_bytes, 4, 48);
}

// Prefetch distance for updating rows, which also load their state and gradient.
EMBEDTRAIN_INLINE int64_t rows_ahead_to_update(int64_t row_bytes) {
    return std::clamp<int64_t>(8192 / (row_bytes + 64), 4, 24);
}

// Prefetches for a loop over an array what it reaches a page later. The hardware prefetches to the end of a page only, so
// without this a loop waits at each page of cold memory.
template <int kWillWrite = 0, typename Value>
EMBEDTRAIN_INLINE void prefetch_ahead(const Value* values, int64_t i) {
    constexpr int64_t page = 4096 / sizeof(Value), line = 64 / sizeof(Value);
    if (i % line == 0) __builtin_prefetch(values + i + page, kWillWrite);
}

template <int kWillWrite>
EMBEDTRAIN_INLINE void prefetch_row(const void* row, int64_t bytes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(row), end = begin + static_cast<uintptr_t>(bytes);
    // Prefetches each cache line that overlaps the row once.
    for (uintptr_t line = begin & ~static_cast<uintptr_t>(63); line < end; line += 64) {
        __builtin_prefetch(reinterpret_cast<const void*>(line), kWillWrite);
    }
}

}  // namespace embedtrain
