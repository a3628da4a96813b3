#include "radix_sort.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace embedtrain {

namespace {

constexpr int kLargestDigit = 11;  // bits: 2048 counters, and 2048 write positions per pass
constexpr int kMaxPasses = 6;

struct Pass {
    const uint64_t* source;
    uint64_t* target;
    int64_t num_words;
    uint64_t base;
    int num_parts, shift, digit_bits;
    uint32_t* places;  // [num_parts][1 << digit_bits]
};

inline uint64_t digit(const Pass& pass, uint64_t word) {
    return (word - pass.base) >> pass.shift & ((1u << pass.digit_bits) - 1);
}

void count_digits(const void* arguments, int part) {
    const Pass& pass = *static_cast<const Pass*>(arguments);
    uint32_t* counts = pass.places + (static_cast<int64_t>(part) << pass.digit_bits);
    std::memset(counts, 0, sizeof(uint32_t) << pass.digit_bits);
    const Range range = range_of_part(pass.num_words, part, pass.num_parts);
    for (int64_t i = range.begin; i < range.end; ++i) ++counts[digit(pass, pass.source[i])];
}

void scatter_digits(const void* arguments, int part) {
    const Pass& pass = *static_cast<const Pass*>(arguments);
    uint32_t* places = pass.places + (static_cast<int64_t>(part) << pass.digit_bits);
    const Range range = range_of_part(pass.num_words, part, pass.num_parts);
    for (int64_t i = range.begin; i < range.end; ++i) {
        const uint64_t word = pass.source[i];
        pass.target[places[digit(pass, word)]++] = word;
    }
}

// Turns counts into write positions, ordered by digit and then by part.
void add_up(const Pass& pass) {
    uint32_t place = 0;
    for (int64_t d = 0; d < 1 << pass.digit_bits; ++d) {
        for (int part = 0; part < pass.num_parts; ++part) {
            uint32_t& entry = pass.places[(static_cast<int64_t>(part) << pass.digit_bits) + d];
            const uint32_t count = entry;
            entry = place;
            place += count;
        }
    }
}

// Counts the digits of all passes in one scan. With one part, the counts do not depend on the order of the words.
void count_all_digits(const Pass* passes, int num_passes) {
    for (int number = 0; number < num_passes; ++number) {
        std::memset(passes[number].places, 0, sizeof(uint32_t) << passes[number].digit_bits);
    }
    if (num_passes == 2) {
        const Pass &low = passes[0], &high = passes[1];
        for (int64_t i = 0; i < low.num_words; ++i) {
            ++low.places[digit(low, low.source[i])];
            ++high.places[digit(high, low.source[i])];
        }
        return;
    }
    for (int64_t i = 0; i < passes[0].num_words; ++i) {
        for (int number = 0; number < num_passes; ++number) {
            ++passes[number].places[digit(passes[number], passes[0].source[i])];
        }
    }
}

int count_passes(int num_bits) { return std::max((num_bits + kLargestDigit - 1) / kLargestDigit, 1); }

}  // namespace

uint64_t* radix_sort(uint64_t* words, uint64_t* spare, int64_t num_words, uint64_t base, int shift, int num_bits,
                     int num_parts) {
    const int num_passes = count_passes(num_bits);
    const int64_t counters = std::max<int64_t>(num_parts, num_passes) << kLargestDigit;
    uint32_t* places = static_cast<uint32_t*>(scratch(2, counters * 4));
    Pass passes[kMaxPasses];
    for (int number = 0; number < num_passes; ++number) {
        const int begin = num_bits * number / num_passes, end = num_bits * (number + 1) / num_passes;
        const int64_t first = num_parts == 1 ? static_cast<int64_t>(number) << kLargestDigit : 0;
        passes[number] = {words, spare, num_words, base, num_parts, shift + begin, end - begin, places + first};
        std::swap(words, spare);
    }
    if (num_parts == 1) count_all_digits(passes, num_passes);
    for (int number = 0; number < num_passes; ++number) {
        if (num_parts > 1) run_parts(num_parts, count_digits, &passes[number]);
        add_up(passes[number]);
        run_parts(num_parts, scatter_digits, &passes[number]);
    }
    return words;
}

}  // namespace embedtrain
