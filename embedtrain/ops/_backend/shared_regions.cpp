// Synchronises processes of one host through a counter in the shared memory of each, and copies what they exchange.

#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

#include "embedtrain.h"
#include "simd.h"

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

// The start of a rank's region. Python uses the first 64 bytes. Each counter has its own cache line.
struct Region {
    alignas(64) unsigned char callers[64];
    alignas(64) std::atomic<uint32_t> published;  // number of exchanges whose part this rank has written
    alignas(64) std::atomic<uint32_t> waiting;    // number of ranks that sleep until `published` changes
};
static_assert(std::atomic<uint32_t>::is_always_lock_free, "counters are shared between processes");

constexpr int64_t kLineBytes = 64;
constexpr int64_t kCopiedAhead = 4096;  // prefetch distance, in bytes
constexpr int kSpins = 4000;  // about 50 microseconds, the time it takes to wake a sleeping process

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

#ifdef __linux__
void sleep_until_changed(std::atomic<uint32_t>* counter, uint32_t seen, int64_t milliseconds) {
    const timespec patience{milliseconds / 1000, milliseconds % 1000 * 1000000};
    syscall(SYS_futex, counter, FUTEX_WAIT, seen, &patience, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>* counter) {
    syscall(SYS_futex, counter, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}
#else
void sleep_until_changed(std::atomic<uint32_t>*, uint32_t, int64_t milliseconds) {
    const timespec patience{0, std::min<int64_t>(milliseconds, 1) * 1000000};
    nanosleep(&patience, nullptr);
}

void wake_all(std::atomic<uint32_t>*) {}
#endif

bool has_come(const Region* region, uint32_t number) {
    // Counters wrap around, which is safe because ranks are never more than one exchange apart.
    return static_cast<int32_t>(region->published.load(std::memory_order_acquire) - number) >= 0;
}

}  // namespace

void embedtrain_publish(void* own_region, int64_t number) {
    Region* region = static_cast<Region*>(own_region);
    // Both sides use sequential consistency. So either a sleeper sees the new count, or this rank sees the sleeper.
    region->published.store(static_cast<uint32_t>(number));
    if (region->waiting.load()) wake_all(&region->published);
}

void embedtrain_await(void* const* regions, int64_t num_regions, int64_t number, int64_t patience_ms,
                      int may_spin, int64_t* first_missing) {
    const uint32_t wanted = static_cast<uint32_t>(number);
    for (int64_t r = 0; r < num_regions; ++r) {
        Region* region = static_cast<Region*>(regions[r]);
        for (int spin = 0; may_spin && spin < kSpins && !has_come(region, wanted); ++spin) relax();
        if (has_come(region, wanted)) continue;
        region->waiting.fetch_add(1);
        const uint32_t seen = region->published.load();
        if (static_cast<int32_t>(seen - wanted) < 0) sleep_until_changed(&region->published, seen, patience_ms);
        region->waiting.fetch_sub(1);
        if (!has_come(region, wanted)) {
            *first_missing = r;
            return;
        }
    }
    *first_missing = num_regions;
}

EMBEDTRAIN_MULTIVERSION void embedtrain_copy(const void* source, void* target, int64_t bytes) {
    const char* from = static_cast<const char*>(source);
    char* to = static_cast<char*>(target);
    int64_t at = 0;
    for (; at + kCopiedAhead + kLineBytes <= bytes; at += kLineBytes) {
        __builtin_prefetch(from + at + kCopiedAhead, 0);
        __builtin_prefetch(to + at + kCopiedAhead, 1);
        std::memcpy(to + at, from + at, kLineBytes);
    }
    std::memcpy(to + at, from + at, static_cast<size_t>(bytes - at));
}
