// Maps ids to keys of their rows, and counts ids that are out of range.

#include <cstdint>

#include "divisor.h"
#include "embedtrain.h"
#include "parallel.h"
#include "simd.h"

namespace {

using namespace embedtrain;

template <typename Id>
void spread(EmbedtrainIds& feature, uint64_t num_local_rows, bool is_whole, int64_t* keys) {
    const Id* ids = static_cast<const Id*>(feature.ids);
    const uint64_t bits = feature.block_bits, num_blocks = feature.num_rows >> bits;
    const uint64_t num_moved = num_blocks << bits;  // ids after the last whole block do not move
    const Divisor blocks(num_blocks), per_rank(feature.rows_per_rank);
    int64_t num_outside = 0;
    for (int64_t i = 0; i < feature.num_ids; ++i) {
        // As unsigned numbers, negative ids are large, so one comparison finds them too.
        const uint64_t given = static_cast<uint64_t>(static_cast<int64_t>(ids[i]));
        num_outside += given >= feature.num_rows;
        const uint64_t id = given >= feature.num_rows ? 0 : given;
        const uint64_t product = (id >> bits) * feature.multiplier;
        const uint64_t block = product - blocks.quotient(product) * num_blocks;
        uint64_t row = id < num_moved ? (block << bits) + (id & ((1ull << bits) - 1)) : id;
        uint64_t first = feature.first_row;
        if (!is_whole) {
            const uint64_t owner = per_rank.quotient(row);
            row -= owner * feature.rows_per_rank;
            first += owner * num_local_rows;
        }
        keys[i] = static_cast<int64_t>(row + first);
    }
    feature.num_outside = num_outside;
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
