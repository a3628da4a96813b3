// Maps ids to keys of their rows, and counts ids that are out of range.

#include <cstdint>

#include "divisor.h"
#include "embedtrain.h"
#include "parallel.h"
#include "rows.h"
#include "simd.h"

namespace {

using namespace embedtrain;

constexpr uint64_t kMostInMap = 1 << 17;  // rows, so that a map of their keys fits into the cache
constexpr uint64_t kIdsPerRow = 4;        // with fewer, computing the key of every row costs more than it saves

// The keys of a table's rows.
struct Keys {
    uint64_t num_rows, multiplier, bits, num_blocks, num_moved, rows_per_rank, first_row, num_local_rows;
    bool is_whole;
    Divisor blocks, per_rank;

    Keys(const EmbedtrainIds& feature, uint64_t local_rows, bool whole)
        : num_rows(feature.num_rows), multiplier(feature.multiplier), bits(feature.block_bits),
          num_blocks(num_rows >> bits), num_moved(num_blocks << bits), rows_per_rank(feature.rows_per_rank),
          first_row(feature.first_row), num_local_rows(local_rows), is_whole(whole), blocks(num_blocks),
          per_rank(rows_per_rank) {}

    // Returns the key of an id in [0, num_rows).
    EMBEDTRAIN_INLINE int64_t of(uint64_t id) const {
        const uint64_t product = (id >> bits) * multiplier;
        const uint64_t block = product - blocks.quotient(product) * num_blocks;
        // Ids after the last whole block do not move.
        uint64_t row = id < num_moved ? (block << bits) + (id & ((1ull << bits) - 1)) : id;
        uint64_t first = first_row;
        if (!is_whole) {
            const uint64_t owner = per_rank.quotient(row);
            row -= owner * rows_per_rank;
            first += owner * num_local_rows;
        }
        return static_cast<int64_t>(row + first);
    }
};

// Writes key_of(id) for each id of a feature, and counts the ids that are not rows.
template <typename Id, typename KeyOf>
EMBEDTRAIN_INLINE void write_keys(EmbedtrainIds& feature, int64_t* keys, KeyOf key_of) {
    const Id* ids = static_cast<const Id*>(feature.ids);
    const uint64_t num_rows = feature.num_rows;
    int64_t num_outside = 0;
    for (int64_t i = 0; i < feature.num_ids; ++i) {
        prefetch_ahead(ids, i);
        prefetch_ahead<1>(keys, i);
        // As unsigned numbers, negative ids are large, so one comparison finds them too.
        const uint64_t given = static_cast<uint64_t>(static_cast<int64_t>(ids[i]));
        num_outside += given >= num_rows;
        keys[i] = key_of(given >= num_rows ? 0 : given);
    }
    feature.num_outside = num_outside;
}

template <typename Id>
void spread(EmbedtrainIds& feature, uint64_t num_local_rows, bool is_whole, int64_t* keys) {
    const Keys table(feature, num_local_rows, is_whole);
    if (table.num_rows > kMostInMap || static_cast<uint64_t>(feature.num_ids) < kIdsPerRow * table.num_rows) {
        write_keys<Id>(feature, keys, [&](uint64_t id) __attribute__((always_inline)) { return table.of(id); });
        return;
    }
    // Of many ids of few rows, most repeat, so the key of each row is computed once.
    int64_t* map = static_cast<int64_t*>(scratch(0, static_cast<int64_t>(table.num_rows + 1) * 8));
    map[0] = 0;  // for ids that are not rows of an empty table
    for (uint64_t id = 0; id < table.num_rows; ++id) map[id] = table.of(id);
    write_keys<Id>(feature, keys, [map](uint64_t id) __attribute__((always_inline)) { return map[id]; });
}

}  // namespace

void embedtrain_spread_keys(EmbedtrainIds* features, int64_t num_features, int64_t num_local_rows, int is_whole,
                            int64_t* keys) {
    for (int64_t f = 0; f < num_features; ++f) {
        if (features[f].is_int32) {
            spread<int32_t>(features[f], static_cast<uint64_t>(num_local_rows), is_whole != 0, keys);
        } else {
            spread<int64_t>(features[f], static_cast<uint64_t>(num_local_rows), is_whole != 0, keys);
        }
        keys += features[f].num_ids;
    }
}
