// Finds distinct keys in ascending order: with one counter per possible key if these are few, else by a radix sort of
// 64-bit words that pack a key and its position.

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "bags.h"
#include "embedtrain.h"
#include "parallel.h"
#include "radix_sort.h"

namespace {

using namespace embedtrain;

constexpr int64_t kMostCounters = 1 << 18;  // so that the counters fit into the cache
constexpr int64_t kCountersPerKey = 8;     // with more, scanning the counters costs more than sorting

struct Packing {
    const int64_t* keys;
    int64_t num_keys;
    int num_parts, position_bits;
    uint64_t* words;
    uint64_t largest;
    std::atomic<int64_t>* outside;
};

EMBEDTRAIN_MULTIVERSION void pack(const void* arguments, int part) {
    const Packing& p = *static_cast<const Packing*>(arguments);
    const Range range = range_of_part(p.num_keys, part, p.num_parts);
    const bool inside = all_inside(p.keys + range.begin, range.end - range.begin, static_cast<int64_t>(p.largest + 1));
    for (int64_t i = range.begin; i < range.end; ++i) {
        p.words[i] = static_cast<uint64_t>(p.keys[i]) << p.position_bits | static_cast<uint64_t>(i);
    }
    if (!inside) ++*p.outside;
}

struct Emission {
    const uint64_t* sorted;
    int64_t num_keys;
    int num_parts, position_bits;
    int64_t *unique, *starts, *order, *inverse;
    int64_t* num_distinct;  // [num_parts]; distinct keys of each part, later of all parts before it
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
        if (e.order) e.order[i] = position;
        if (e.inverse) e.inverse[position] = next - 1;
    }
}

// Returns whether all keys have a counter; if not, the output is not written.
bool count_keys(const int64_t* keys, int64_t num_keys, int64_t num_counters, const Emission& e) {
    uint32_t* places = static_cast<uint32_t*>(scratch(0, num_counters * 4));
    uint32_t* numbers = static_cast<uint32_t*>(scratch(1, num_counters * 4));
    std::fill_n(places, num_counters, 0u);
    for (int64_t i = 0; i < num_keys; ++i) {
        prefetch_ahead(keys, i);
        if (static_cast<uint64_t>(keys[i]) >= static_cast<uint64_t>(num_counters)) return false;
        ++places[keys[i]];
    }
    int64_t next = 0;
    uint32_t place = 0;
    for (int64_t key = 0; key < num_counters; ++key) {
        // Always written, and overwritten if the key does not occur. A branch would often be mispredicted.
        const uint32_t count = places[key];
        e.unique[next] = key;
        e.starts[next] = place;
        numbers[key] = static_cast<uint32_t>(next);
        places[key] = place;
        next += count != 0;
        place += count;
    }
    if (e.order) {
        for (int64_t i = 0; i < num_keys; ++i) e.order[places[keys[i]]++] = i;
    }
    if (e.inverse) {
        for (int64_t i = 0; i < num_keys; ++i) {
            prefetch_ahead(keys, i);
            prefetch_ahead<1>(e.inverse, i);
            e.inverse[i] = numbers[keys[i]];
        }
    }
    e.starts[next] = num_keys;
    *e.num_distinct = next;
    return true;
}

}  // namespace

void embedtrain_sort_unique(const int64_t* keys, int64_t num_keys, int64_t largest, int num_threads,
                            int64_t* unique, int64_t* starts, int64_t* order, int64_t* inverse,
                            int64_t* num_distinct, int64_t* num_outside) {
    *num_outside = 0;
    if (largest < kMostCounters && largest < kCountersPerKey * num_keys) {
        const Emission emission{nullptr, num_keys, 1, 0, unique, starts, order, inverse, num_distinct};
        *num_outside = !count_keys(keys, num_keys, largest + 1, emission);
        return;
    }
    const int num_parts = num_keys < 32768 ? 1 : std::min(num_threads, kMaxSortParts);
    const int position_bits = bits_of(static_cast<uint64_t>(std::max<int64_t>(num_keys - 1, 0)));
    uint64_t* words = static_cast<uint64_t*>(scratch(0, num_keys * 8));
    std::atomic<int64_t> outside{0};
    const Packing packing{keys, num_keys, num_parts, position_bits, words, static_cast<uint64_t>(largest), &outside};
    run_parts(num_parts, pack, &packing);
    *num_outside = outside;
    if (outside) return;
    words = radix_sort(words, static_cast<uint64_t*>(scratch(1, num_keys * 8)), num_keys, 0, position_bits,
                       bits_of(static_cast<uint64_t>(largest)), num_parts);
    int64_t counts[kMaxSortParts];
    Emission emission{words, num_keys, num_parts, position_bits, unique, starts, order, inverse, counts};
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

void embedtrain_order_of_inverse(const int64_t* inverse, int64_t num_keys, const int64_t* starts, int64_t num_distinct,
                                 int64_t* order, int64_t* num_outside) {
    int64_t* places = static_cast<int64_t*>(scratch(0, num_distinct * 8));
    std::copy_n(starts, num_distinct, places);
    // If no key has more positions than its starts say, and these are num_keys in all, then every position is written.
    int64_t outside = starts[0] != 0 || starts[num_distinct] != num_keys;
    for (int64_t key = 0; key < num_distinct; ++key) outside += starts[key] > starts[key + 1];
    if (outside) num_keys = 0;
    for (int64_t i = 0; i < num_keys; ++i) {
        const int64_t key = inverse[i];
        if (static_cast<uint64_t>(key) >= static_cast<uint64_t>(num_distinct) || places[key] >= starts[key + 1]) {
            ++outside;
        } else {
            order[places[key]++] = i;
        }
    }
    *num_outside = outside;
}
