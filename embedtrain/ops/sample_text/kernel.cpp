// Samples a text: subsampling, windows and negatives. See sample_text/__init__.py for the use of each random draw.

#include <algorithm>
#include <cstdint>

#include "embedtrain.h"
#include "random.h"

using namespace embedtrain;

EMBEDTRAIN_MULTIVERSION void embedtrain_sample_text(
    const int32_t* tokens, const int64_t* positions, const int32_t* parts, int64_t num_tokens, const int32_t* keep,
    const uint64_t* columns, const int64_t* part_starts, int64_t window, int64_t num_negatives, int64_t signed_key,
    int64_t* words, int64_t* targets, int64_t* starts, int64_t* stops, int64_t* num_kept) {
    const uint64_t key = static_cast<uint64_t>(signed_key);
    const uint64_t draws_per_token = static_cast<uint64_t>(num_negatives) + 1;
    int64_t kept = 0;
    int64_t sentence_start = 0;
    const auto end_sentence = [&] {
        for (int64_t i = sentence_start; i < kept; ++i) stops[i] = std::min(stops[i], kept);
        sentence_start = kept;
    };
    for (int64_t i = 0; i < num_tokens; ++i) {
        if (tokens[i] < 0) end_sentence();
        const int64_t row = tokens[i] < 0 ? ~tokens[i] : tokens[i];
        const uint64_t counter = static_cast<uint64_t>(positions[i]) * draws_per_token;
        const uint64_t draw = stream(key, counter);
        if (static_cast<int64_t>(draw >> 40) >= keep[row]) continue;
        const int64_t width = 1 + static_cast<int64_t>(((draw & 0xFFFFFFFFull) * static_cast<uint64_t>(window)) >> 32);
        words[kept] = row;
        starts[kept] = std::max(kept - width, sentence_start);
        stops[kept] = kept + width + 1;
        targets[kept * (1 + num_negatives)] = row;
        const uint64_t* part = columns + 2 * part_starts[parts[i]];
        const uint64_t part_size = static_cast<uint64_t>(part_starts[parts[i] + 1] - part_starts[parts[i]]);
        int64_t* drawn_rows = targets + kept * (1 + num_negatives) + 1;
        for (int64_t k = 0; k < num_negatives; ++k) {
            const uint64_t drawn = stream(key, counter + 1 + static_cast<uint64_t>(k));
            const uint64_t* column = part + 2 * (((drawn >> 32) * part_size) >> 32);
            const bool is_own = (drawn & 0xFFFFFFFFull) < column[0] >> 32;
            drawn_rows[k] = static_cast<int64_t>(is_own ? column[1] : column[0] & 0xFFFFFFFFull);
        }
        ++kept;
    }
    end_sentence();
    *num_kept = kept;
}
