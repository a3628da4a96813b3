// Rows of float32 or bfloat16, read as float32.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace embedtrain {

constexpr int64_t kPrefetchAhead = 12;  // rows; random rows are far apart, and the hardware cannot guess them
constexpr int64_t kReadAheadBytes = 8192;  // as many lines in flight as one core sustains
constexpr int64_t kWriteAheadBytes = 4096;  // less, where a row brings its gradient and its state along
constexpr int64_t kSmallWork = 1 << 15;  // values; below it, waking a thread costs more than it saves

typedef uint16_t uint16x16 __attribute__((vector_size(32)));
typedef uint32_t uint32x16 __attribute__((vector_size(64)));

EMBEDTRAIN_INLINE float to_float(float value) { return value; }

EMBEDTRAIN_INLINE float to_float(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof(value));
    return value;
}

EMBEDTRAIN_INLINE void load_row(float16v& vector, const float* source) { load(vector, source); }

EMBEDTRAIN_INLINE void load_row(float16v& vector, const uint16_t* source) {
    uint16x16 bits;
    std::memcpy(&bits, source, sizeof(bits));
    const uint32x16 wide = __builtin_convertvector(bits, uint32x16) << 16;
    std::memcpy(&vector, &wide, sizeof(wide));
}

// How many rows before it is needed a row is asked for, so that `bytes` are under way.
EMBEDTRAIN_INLINE int64_t rows_ahead(int64_t row_bytes, int64_t bytes) {
    return std::min<int64_t>(std::max<int64_t>(bytes / row_bytes, 4), 64);
}

template <int kWillWrite>
EMBEDTRAIN_INLINE void prefetch_row(const void* row, int64_t bytes) {
    const char* first = static_cast<const char*>(row);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(first + at, kWillWrite);
    // A row that does not begin with a cache line ends in one more.
    __builtin_prefetch(first + bytes - 1, kWillWrite);
}

}  // namespace embedtrain
