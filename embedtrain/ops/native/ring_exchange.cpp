// Bytes between processes of one host, through rings in shared memory: one ring for each ordered pair of ranks.

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>

namespace {

// A ring's header; its bytes follow. Both counts only grow, and each has one writer and a cache line of its own.
struct Ring {
    alignas(64) std::atomic<uint64_t> written;
    alignas(64) std::atomic<uint64_t> read;
    alignas(64) unsigned char bytes[];
};
static_assert(std::atomic<uint64_t>::is_always_lock_free, "counts are shared between processes");

constexpr int64_t kPiece = 1 << 16;  // published at once, so that the reader starts while the writer goes on
constexpr int kSpins = 2000, kYields = 200;

// What is left to do with one peer, as the caller lays it out in 64-bit words.
struct Peer {
    Ring *out, *in;
    const unsigned char* send;
    int64_t to_send;
    unsigned char* receive;
    int64_t to_receive;
};

bool push(Peer& peer, int64_t capacity) {
    const uint64_t written = peer.out->written.load(std::memory_order_relaxed);
    const int64_t room = capacity - static_cast<int64_t>(written - peer.out->read.load(std::memory_order_acquire));
    const int64_t at = static_cast<int64_t>(written % static_cast<uint64_t>(capacity));
    const int64_t count = std::min({peer.to_send, room, capacity - at, kPiece});
    if (count <= 0) return false;
    std::memcpy(peer.out->bytes + at, peer.send, static_cast<size_t>(count));
    peer.out->written.store(written + static_cast<uint64_t>(count), std::memory_order_release);
    peer.send += count;
    peer.to_send -= count;
    return true;
}

bool pull(Peer& peer, int64_t capacity) {
    const uint64_t read = peer.in->read.load(std::memory_order_relaxed);
    const int64_t ready = static_cast<int64_t>(peer.in->written.load(std::memory_order_acquire) - read);
    const int64_t at = static_cast<int64_t>(read % static_cast<uint64_t>(capacity));
    const int64_t count = std::min({peer.to_receive, ready, capacity - at, kPiece});
    if (count <= 0) return false;
    std::memcpy(peer.receive, peer.in->bytes + at, static_cast<size_t>(count));
    peer.in->read.store(read + static_cast<uint64_t>(count), std::memory_order_release);
    peer.receive += count;
    peer.to_receive -= count;
    return true;
}

int64_t milliseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void wait_a_little(int idle) {
    if (idle < kSpins) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    } else if (idle < kSpins + kYields) {
        sched_yield();
    } else {
        const timespec pause{0, 50000};
        nanosleep(&pause, nullptr);
    }
}

}  // namespace

// peers: [num_peers], brought up to date as bytes move; capacity: bytes of each ring; is_done: whether all bytes
// moved, or `patience_ms` passed in which none did.
extern "C" void embedtrain_ring_exchange(void* peers, int64_t num_peers, int64_t capacity, int64_t patience_ms,
                                         int64_t* is_done) {
    Peer* all = static_cast<Peer*>(peers);
    int idle = 0;
    int64_t idle_since = 0;
    for (;;) {
        bool moved = false, left = false;
        for (int64_t p = 0; p < num_peers; ++p) {
            moved |= push(all[p], capacity);
            moved |= pull(all[p], capacity);
            left |= all[p].to_send > 0 || all[p].to_receive > 0;
        }
        if (!left) break;
        if (moved) {
            idle = 0;
            continue;
        }
        if (idle == kSpins + kYields) idle_since = milliseconds();
        if (idle > kSpins + kYields && milliseconds() - idle_since > patience_ms) {
            *is_done = 0;
            return;
        }
        wait_a_little(idle);
        if (idle < 1 << 30) ++idle;
    }
    *is_done = 1;
}
