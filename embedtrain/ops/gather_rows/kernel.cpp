// Copies random rows into a compact buffer.

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "embedtrain.h"
#include "parallel.h"
#include "rows.h"

namespace {

using namespace embedtrain;

struct Gather {
    const void* source;
    int64_t num_source_rows;
    const int64_t* rows;
    int64_t num_rows, dim;
    void* target;
    int num_parts;
    std::atomic<int64_t>* outside;
};

EMBEDTRAIN_INLINE float converted(float value, float) { return value; }

// Rounds to the nearest bfloat16, ties to even; NaN stays NaN.
EMBEDTRAIN_INLINE uint16_t converted(float value, uint16_t) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7FC0 : rounded);
}

template <typename Stored, typename Wanted>
EMBEDTRAIN_INLINE void gather(const Gather& g, int part) {
    const Stored* source = static_cast<const Stored*>(g.source);
    Wanted* target = static_cast<Wanted*>(g.target);
    const int64_t row_bytes = g.dim * static_cast<int64_t>(sizeof(Stored));
    const Range range = range_of_part(g.num_rows, part, g.num_parts);
    const int64_t ahead = rows_ahead_to_read(row_bytes);
    for (int64_t i = range.begin; i < range.end; ++i) {
        if (i + ahead < range.end) {
            prefetch_row<0>(source + g.rows[i + ahead] * g.dim, row_bytes);
            prefetch_row<1>(target + (i + ahead) * g.dim, g.dim * static_cast<int64_t>(sizeof(Wanted)));
        }
        // As unsigned numbers, negative rows are large, so one comparison finds them too.
        if (static_cast<uint64_t>(g.rows[i]) >= static_cast<uint64_t>(g.num_source_rows)) {
            ++*g.outside;
            continue;
        }
        const Stored* row = source + g.rows[i] * g.dim;
        if (sizeof(Stored) == sizeof(Wanted)) {
            std::memcpy(target + i * g.dim, row, row_bytes);
        } else {
            for (int64_t d = 0; d < g.dim; ++d) target[i * g.dim + d] = converted(to_float(row[d]), Wanted{});
        }
    }
}

EMBEDTRAIN_MULTIVERSION void gather_float32(const void* g, int part) {
    gather<float, float>(*static_cast<const Gather*>(g), part);
}

EMBEDTRAIN_MULTIVERSION void gather_bfloat16(const void* g, int part) {
    gather<uint16_t, uint16_t>(*static_cast<const Gather*>(g), part);
}

EMBEDTRAIN_MULTIVERSION void gather_widened(const void* g, int part) {
    gather<uint16_t, float>(*static_cast<const Gather*>(g), part);
}

EMBEDTRAIN_MULTIVERSION void gather_narrowed(const void* g, int part) {
    gather<float, uint16_t>(*static_cast<const Gather*>(g), part);
}

}  // namespace

void embedtrain_gather_rows(const void* source, int64_t num_source_rows, int source_is_bfloat16, const int64_t* rows,
                            int64_t num_rows, int64_t dim, void* target, int target_is_bfloat16, int num_threads,
                            int64_t* num_outside) {
    const int num_parts = num_rows * dim < kSmallWork ? 1 : num_threads;
    std::atomic<int64_t> outside{0};
    const Gather g{source, num_source_rows, rows, num_rows, dim, target, num_parts, &outside};
    void (*const from_float32)(const void*, int) = target_is_bfloat16 ? gather_narrowed : gather_float32;
    void (*const from_bfloat16)(const void*, int) = target_is_bfloat16 ? gather_bfloat16 : gather_widened;
    run_parts(num_parts, source_is_bfloat16 ? from_bfloat16 : from_float32, &g);
    *num_outside = outside;
}
