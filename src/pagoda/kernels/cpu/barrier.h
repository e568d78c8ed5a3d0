// The threads of one step meet here several times a layer. Waiting spins, then yields, so that a thread that lost its
// core to a busy neighbour gets it back. The last to arrive also resets the counter from which work is claimed.
#pragma once
#include <sched.h>
#include <atomic>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

class Barrier {
 public:
  // Every one of `threads` threads calls this; all return after the last call.
  void wait(int threads) {
    if (threads == 1) { work.store(0, std::memory_order_relaxed); return; }
    const unsigned round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      work.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++)
      if (spins < 4096) pause(); else sched_yield();
  }
  // The next unclaimed job since the last wait: 0, 1, 2, ...
  int claim() { return work.fetch_add(1, std::memory_order_relaxed); }

 private:
  static void pause() {
#if defined(__SSE2__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> round_{0};
  alignas(64) std::atomic<int> work{0};
};
