// Division by a fixed divisor through multiplication with its reciprocal.

#pragma once

#include <cstdint>

#include "simd.h"

namespace embedtrain {

// Exact for values below 2^62; the approximate quotient needs one correction.
struct Divisor {
    uint64_t divisor, reciprocal;
    explicit Divisor(uint64_t d) : divisor(d), reciprocal(d > 1 ? ~0ull / d : ~0ull) {}
    EMBEDTRAIN_INLINE uint64_t quotient(uint64_t value) const {
        uint64_t q = static_cast<uint64_t>(static_cast<unsigned __int128>(value) * reciprocal >> 64);
        q += value - q * divisor >= divisor;
        return q;
    }
};

}  // namespace embedtrain
