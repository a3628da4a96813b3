// Distinct keys in ascending order: by a counter a key where few keys are possible, else by a radix sort of
// (key, position), packed into one 64-bit word each.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"

namespace {

using namespace embedtrain;

constexpr int kLargestDigit = 11;  // bits; 2048 counters, and as many places written to at once
constexpr int kMaxParts = 64;
constexpr int64_t kMostCounters = 1 << 18;  // that they stay in the cache
constexpr int64_t kCountersPerKey = 8;     // beyond it, looking through them costs more than sorting

struct Pass {
    const int64_t* keys;  // the first pass packs them; later ones read `source`
    const uint64_t* source;
    uint64_t* target;
    int64_t num_keys;
    int num_parts, position_bits, shift, digit_bits;
    uint32_t* places;  // [num_parts][1 << digit_bits]
};

inline uint64_t word_at(const Pass& pass, int64_t i) {
    if (pass.source) return pass.source[i];
    return static_cast<uint64_t>(pass.keys[i]) << pass.position_bits | static_cast<uint64_t>(i);
}

void count_digits(const void* arguments, int part) {
    const Pass& pass = *static_cast<const Pass*>(arguments);
    const uint32_t mask = (1u << pass.digit_bits) - 1;
    uint32_t* counts = pass.places + (static_cast<int64_t>(part) << pass.digit_bits);
    std::memset(counts, 0, sizeof(uint32_t) << pass.digit_bits);
    const Range range = range_of_part(pass.num_keys, part, pass.num_parts);
    for (int64_t i = range.begin; i < range.end; ++i) ++counts[word_at(pass, i) >> pass.shift & mask];
}

void scatter_digits(const void* arguments, int part) {
    const Pass& pass = *static_cast<const Pass*>(arguments);
    const uint32_t mask = (1u << pass.digit_bits) - 1;
    uint32_t* places = pass.places + (static_cast<int64_t>(part) << pass.digit_bits);
    const Range range = range_of_part(pass.num_keys, part, pass.num_parts);
    for (int64_t i = range.begin; i < range.end; ++i) {
        const uint64_t word = word_at(pass, i);
        pass.target[places[word >> pass.shift & mask]++] = word;
    }
}

void run_pass(const Pass& pass) {
    run_parts(pass.num_parts, count_digits, &pass);
    uint32_t place = 0;
    for (int64_t digit = 0; digit < 1 << pass.digit_bits; ++digit) {
        for (int part = 0; part < pass.num_parts; ++part) {
            uint32_t& entry = pass.places[(static_cast<int64_t>(part) << pass.digit_bits) + digit];
            const uint32_t count = entry;
            entry = place;
            place += count;
        }
    }
    run_parts(pass.num_parts, scatter_digits, &pass);
}

struct Emission {
    const uint64_t* sorted;
    int64_t num_keys;
    int num_parts, position_bits;
    int64_t *unique, *starts, *order, *inverse;
    int64_t* num_distinct;  // [num_parts]; of each part, then before each part
};

inline bool is_first(const Emission& e, int64_t i) {
    return i == 0 || e.sorted[i] >> e.position_bits != e.sorted[i - 1] >> e.position_bits;
}

void count_distinct(const void* arguments, int part) {
    const Emission& e = *static_cast<const Emission*>(arguments);
    const Range range = range_of_part(e.num_keys, part, e.num_parts);
    int64_t count = 0;
    for (int64_t i = range.begin; i < range.end; ++i) count += is_first(e, i);
    e.num_distinct[part] = count;
}

void emit_distinct(const void* arguments, int part) {
    const Emission& e = *static_cast<const Emission*>(arguments);
    const Range range = range_of_part(e.num_keys, part, e.num_parts);
    const uint64_t mask = (1ull << e.position_bits) - 1;
    int64_t next = e.num_distinct[part];
    for (int64_t i = range.begin; i < range.end; ++i) {
        if (is_first(e, i)) {
            e.unique[next] = static_cast<int64_t>(e.sorted[i] >> e.position_bits);
            e.starts[next++] = i;
        }
        const int64_t position = static_cast<int64_t>(e.sorted[i] & mask);
        e.order[i] = position;
        if (e.inverse) e.inverse[position] = next - 1;
    }
}

void count_keys(const int64_t* keys, int64_t num_keys, int64_t num_counters, const Emission& e) {
    uint32_t* places = static_cast<uint32_t*>(scratch(0, num_counters * 4));
    uint32_t* numbers = static_cast<uint32_t*>(scratch(1, num_counters * 4));
    std::fill_n(places, num_counters, 0u);
    for (int64_t i = 0; i < num_keys; ++i) ++places[keys[i]];
    int64_t next = 0;
    uint32_t place = 0;
    for (int64_t key = 0; key < num_counters; ++key) {
        // Written in any case, and kept where the key occurs: a branch would be guessed wrong too often.
        const uint32_t count = places[key];
        e.unique[next] = key;
        e.starts[next] = place;
        numbers[key] = static_cast<uint32_t>(next);
        places[key] = place;
        next += count != 0;
        place += count;
    }
    for (int64_t i = 0; i < num_keys; ++i) e.order[places[keys[i]]++] = i;
    if (e.inverse) {
        for (int64_t i = 0; i < num_keys; ++i) e.inverse[i] = numbers[keys[i]];
    }
    e.starts[next] = num_keys;
    *e.num_distinct = next;
}

int bits_of(uint64_t value) { return value == 0 ? 0 : 64 - __builtin_clzll(value); }

}  // namespace

// keys: [num_keys], none negative, the largest `largest`, which with the number of keys fits into 64 bits (the caller
// has checked both). unique: [num_keys + 1]; starts: [num_keys + 1]; order: [num_keys]; inverse: [num_keys] or null;
// num_distinct: one number, how many of `unique` were written.
extern "C" void embedtrain_sort_unique(const int64_t* keys, int64_t num_keys, int64_t largest, int num_threads,
                                       int64_t* unique, int64_t* starts, int64_t* order, int64_t* inverse,
                                       int64_t* num_distinct) {
    if (largest < kMostCounters && largest < kCountersPerKey * num_keys) {
        const Emission emission{nullptr, num_keys, 1, 0, unique, starts, order, inverse, num_distinct};
        count_keys(keys, num_keys, largest + 1, emission);
        return;
    }
    const int num_parts = num_keys < 32768 ? 1 : std::min(num_threads, kMaxParts);
    const int position_bits = bits_of(static_cast<uint64_t>(std::max<int64_t>(num_keys - 1, 0)));
    const int key_bits = std::max(bits_of(static_cast<uint64_t>(largest)), 1);
    const int num_passes = (key_bits + kLargestDigit - 1) / kLargestDigit;
    uint64_t* buffers[2] = {static_cast<uint64_t*>(scratch(0, num_keys * 8)),
                            static_cast<uint64_t*>(scratch(1, num_keys * 8))};
    uint32_t* places = static_cast<uint32_t*>(scratch(2, (num_parts * 4ll) << kLargestDigit));
    Pass pass{keys, nullptr, buffers[0], num_keys, num_parts, position_bits, position_bits, 0, places};
    for (int number = 0; number < num_passes; ++number) {
        const int begin = key_bits * number / num_passes, end = key_bits * (number + 1) / num_passes;
        pass.shift = position_bits + begin;
        pass.digit_bits = end - begin;
        pass.target = buffers[number % 2];
        run_pass(pass);
        pass.source = pass.target;
    }
    int64_t counts[kMaxParts];
    Emission emission{pass.source, num_keys, num_parts, position_bits, unique, starts, order, inverse, counts};
    run_parts(num_parts, count_distinct, &emission);
    int64_t total = 0;
    for (int part = 0; part < num_parts; ++part) {
        const int64_t count = counts[part];
        counts[part] = total;
        total += count;
    }
    run_parts(num_parts, emit_distinct, &emission);
    starts[total] = num_keys;
    *num_distinct = total;
}
