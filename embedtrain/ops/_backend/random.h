// splitmix64, as in mix.py.

#pragma once

#include <cstdint>

#include "simd.h"

namespace embedtrain {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15ull;

EMBEDTRAIN_INLINE uint64_t mix64(uint64_t value) {
    value += kGolden;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9ull;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBull;
    return value ^ (value >> 31);
}

// Returns output number `counter` of the random stream of `key`.
EMBEDTRAIN_INLINE uint64_t stream(uint64_t key, uint64_t counter) { return mix64(key + counter * kGolden); }

}  // namespace embedtrain
