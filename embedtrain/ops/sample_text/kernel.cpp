// Samples a text: subsampling, windows and negatives. See sample_text/__init__.py for the use of each random draw.
//
// Works on a chunk of tokens at a time. The draws of a chunk are computed in loops of their own, which the compiler
// vectorises.

#include <algorithm>
#include <cstdint>

#include "embedtrain.h"
#include "random.h"

namespace {

using namespace embedtrain;

constexpr int64_t kChunk = 512;  // tokens; the arrays of a chunk stay in the innermost cache

// The kept words of a chunk.
struct Kept {
    int64_t num = 0;
    uint64_t counters[kChunk];    // counter of the first draw of each word
    uint64_t first[kChunk], size[kChunk];  // columns of the part of the vocabulary of its negatives
};

// Draws negative `number`, from 1 on, of each kept word. targets: [num, row_size].
EMBEDTRAIN_INLINE void draw_negatives(const Kept& kept, uint64_t key, uint64_t number, const uint64_t* columns,
                                      int64_t row_size, int64_t* targets) {
    uint64_t places[kChunk], chances[kChunk];
    for (int64_t j = 0; j < kept.num; ++j) {
        const uint64_t drawn = stream(key, kept.counters[j] + number);
        places[j] = kept.first[j] + (((drawn >> 32) * kept.size[j]) >> 32);
        chances[j] = drawn & 0xFFFFFFFFull;
    }
    for (int64_t j = 0; j < kept.num; ++j) {
        const uint64_t* column = columns + 2 * places[j];
        // A branch would be mispredicted half of the time, so a mask selects the row.
        const uint64_t other = column[0] & 0xFFFFFFFFull, is_own = chances[j] < column[0] >> 32;
        const uint64_t row = other ^ ((other ^ column[1]) & (0 - is_own));
        targets[j * row_size + static_cast<int64_t>(number)] = static_cast<int64_t>(row);
    }
}

}  // namespace

EMBEDTRAIN_MULTIVERSION void embedtrain_sample_text(
    const int32_t* tokens, const int64_t* positions, const int32_t* parts, int64_t num_tokens, const int32_t* keep,
    const uint64_t* columns, const int64_t* part_starts, int64_t window, int64_t num_negatives, int64_t signed_key,
    int64_t* words, int64_t* targets, int64_t* starts, int64_t* stops, int64_t* num_kept) {
    const uint64_t key = static_cast<uint64_t>(signed_key);
    const int64_t row_size = 1 + num_negatives;
    int64_t total = 0;
    int64_t sentence_start = 0;
    const auto end_sentence = [&] {
        for (int64_t i = sentence_start; i < total; ++i) stops[i] = std::min(stops[i], total);
        sentence_start = total;
    };
    for (int64_t begin = 0; begin < num_tokens; begin += kChunk) {
        const int64_t count = std::min(kChunk, num_tokens - begin);
        uint64_t counters[kChunk], draws[kChunk];
        for (int64_t i = 0; i < count; ++i) {
            counters[i] = static_cast<uint64_t>(positions[begin + i]) * static_cast<uint64_t>(row_size);
            draws[i] = stream(key, counters[i]);
        }
        Kept kept;
        int64_t* chunk_targets = targets + total * row_size;
        for (int64_t i = 0; i < count; ++i) {
            const int32_t token = tokens[begin + i];
            if (token < 0) end_sentence();
            const int64_t row = token < 0 ? ~token : token;
            if (static_cast<int64_t>(draws[i] >> 40) >= keep[row]) continue;
            const uint64_t share = draws[i] & 0xFFFFFFFFull;
            const int64_t width = 1 + static_cast<int64_t>((share * static_cast<uint64_t>(window)) >> 32);
            words[total] = row;
            starts[total] = std::max(total - width, sentence_start);
            stops[total] = total + width + 1;
            targets[total * row_size] = row;
            ++total;
            const int64_t* part = part_starts + parts[begin + i];
            kept.counters[kept.num] = counters[i];
            kept.first[kept.num] = static_cast<uint64_t>(part[0]);
            kept.size[kept.num++] = static_cast<uint64_t>(part[1] - part[0]);
        }
        for (int64_t k = 1; k <= num_negatives; ++k) {
            draw_negatives(kept, key, static_cast<uint64_t>(k), columns, row_size, chunk_targets);
        }
    }
    end_sentence();
    *num_kept = total;
}
