// Barrier and work counter under the thread sanitizer: plain std::thread, no OpenMP (whose own locks it cannot see).
// Plain (not atomic) memory passes from thread to thread across waits, so that a missing order is a reported race.
#include <cstdio>
#include <thread>
#include <vector>
#include "barrier.h"

int main() {
  constexpr int THREADS = 4, ROUNDS = 300, JOBS = 37;
  Barrier barrier;
  std::vector<int> source(JOBS, 1), target(JOBS, 0);
  std::vector<int> errors(THREADS, 0);
  auto body = [&](int t) {
    for (int round = 0; round < ROUNDS; round++) {
      for (int j = barrier.claim(); j < JOBS; j = barrier.claim()) target[j] = source[(j + 1) % JOBS] + 1;
      barrier.wait(THREADS);
      for (int j = barrier.claim(); j < JOBS; j = barrier.claim()) source[j] = target[(j + 5) % JOBS];
      barrier.wait(THREADS);
      for (int j = 0; j < JOBS; j++) errors[t] += source[j] != round + 2;
      barrier.wait(THREADS);
    }
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < THREADS; t++) threads.emplace_back(body, t);
  for (auto& thread : threads) thread.join();
  int total = 0;
  for (int e : errors) total += e;
  printf("%d errors\n", total);
  return total != 0;
}
