// Radix sort of 64-bit words by some of their bits.

#pragma once

#include <cstdint>

namespace embedtrain {

constexpr int kMaxSortParts = 64;

// Sorts stably by the bits [shift, shift + num_bits) of (word - base). Returns the sorted words, which are in `words`
// or in `spare`, a buffer of the same size.
uint64_t* radix_sort(uint64_t* words, uint64_t* spare, int64_t num_words, uint64_t base, int shift, int num_bits,
                     int num_parts);

inline int bits_of(uint64_t value) { return value == 0 ? 0 : 64 - __builtin_clzll(value); }

}  // namespace embedtrain
