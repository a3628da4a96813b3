// Work in parts on a few threads that are kept between calls.

#pragma once

#include <cstdint>

namespace embedtrain {

// Runs work(arguments, part) for every part from 0 to num_parts - 1, part 0 on the calling thread, and returns
// when all are done. What a part does may not depend on the thread that runs it, so results depend on num_parts
// alone.
void run_parts(int num_parts, void (*work)(const void*, int), const void* arguments);

// The half-open range of `total` things that fall to a part.
struct Range {
    int64_t begin, end;
};

inline Range range_of_part(int64_t total, int part, int num_parts) {
    return {total * part / num_parts, total * (part + 1) / num_parts};
}

// Memory of at least `bytes`, kept by the calling thread between calls; fresh pages would cost more than most kernels
// that need them. Each slot is a buffer of its own; its content is whatever was left there.
void* scratch(int slot, int64_t bytes);

}  // namespace embedtrain
