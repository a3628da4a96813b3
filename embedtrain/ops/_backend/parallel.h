// Runs work in parts on threads that are kept between calls.

#pragma once

#include <cstdint>

namespace embedtrain {

// Runs work(arguments, part) for every part from 0 to num_parts - 1, and returns when all are done. Part 0 runs on the
// calling thread. A part's result must not depend on the thread that runs it, so results depend on num_parts only.
void run_parts(int num_parts, void (*work)(const void*, int), const void* arguments);

// The half-open range of items of a part.
struct Range {
    int64_t begin, end;
};

inline Range range_of_part(int64_t total, int part, int num_parts) {
    return {total * part / num_parts, total * (part + 1) / num_parts};
}

// Returns uninitialised memory of at least `bytes`, which the calling thread keeps between calls, because mapping new
// pages would cost more than most kernels. Each slot is a separate buffer.
void* scratch(int slot, int64_t bytes);

}  // namespace embedtrain
