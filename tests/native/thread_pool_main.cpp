// Exercises csrc/cpu/thread_pool.cpp on its own: coverage of the range, exceptions, busy pool, fork.
// Exits with 0, or prints the condition that failed and exits with 1.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/thread_pool.h"

using slime_fused::cpu::parallel_for;

#define EXPECT(condition)                                          \
  do {                                                             \
    if (!(condition)) {                                            \
      std::printf("line %d: %s is false\n", __LINE__, #condition); \
      std::exit(1);                                                \
    }                                                              \
  } while (0)

namespace {

// Every index of [0, total) is visited exactly once, in parts of at least min_part.
void covers_the_range(int64_t total, int64_t min_part, int threads) {
  std::vector<int> visits(total, 0);
  parallel_for(total, min_part, threads, [&](int64_t begin, int64_t end) {
    EXPECT(begin < end);
    for (int64_t i = begin; i < end; ++i) ++visits[i];
  });
  for (int count : visits) EXPECT(count == 1);
}

// An exception of any part reaches the caller after all parts ended, and the pool works on.
void rethrows(int64_t failing_index) {
  bool caught = false;
  try {
    parallel_for(4, 1, 4, [&](int64_t begin, int64_t) {
      if (begin == failing_index) throw std::runtime_error("part failed");
    });
  } catch (const std::runtime_error& error) {
    caught = std::string(error.what()) == "part failed";
  }
  EXPECT(caught);
  covers_the_range(100, 1, 4);
}

void serves_callers_at_once() {
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([] {
      for (int round = 0; round < 200; ++round) covers_the_range(64, 1, 3);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

void survives_fork() {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a child that waits for its parent's threads is killed
    covers_the_range(100, 1, 4);
    _exit(0);
  }
  int status = -1;
  EXPECT(waitpid(child, &status, 0) == child);
  EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

}  // namespace

int main() {
  for (int64_t total : {0, 1, 3, 100}) {
    for (int threads : {1, 2, 7, 1000}) covers_the_range(total, 1, threads);
  }
  covers_the_range(100, 60, 8);
  for (int64_t part = 0; part < 4; ++part) rethrows(part);
  serves_callers_at_once();
  survives_fork();
  std::puts("thread pool done");
  return 0;
}
