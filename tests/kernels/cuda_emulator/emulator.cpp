// The scheduler of the emulator (see cuda_runtime.h), and what turns a fault of a kernel into an exception: accesses outside
// of an array or not aligned to their type and overflows (the sources are compiled with -fsanitize, whose reports come here),
// and accesses to memory that nobody allocated.
#include <setjmp.h>
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

dim3 threadIdx, blockIdx;

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;

enum class State { ready, waits_for_warp, waits_for_block, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;
};

struct Thread {
  ucontext_t start;
  jmp_buf where;  // it left off
  bool is_started;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  int line;                               // of the barrier it waits at
  int exchanges;                          // how many it took part in
  std::vector<std::vector<Copy>> copies;  // groups; the last one is not committed
};

// Two buffers in turn: a lane can be at most one exchange ahead of one that still reads.
struct Warp {
  alignas(16) char gifts[2][kWarp * kExchanged];
};

unsigned order_seed = 0;
std::vector<Thread> threads;
std::vector<Warp> warps;
jmp_buf scheduler;
Thread* running;
const std::function<void()>* body;
std::exception_ptr failure;

// Contexts start the coroutines; jumps, which need no system call, switch between them.
void resume(Thread& thread) {
  if (_setjmp(scheduler) != 0) return;
  if (thread.is_started) _longjmp(thread.where, 1);
  thread.is_started = true;
  setcontext(&thread.start);
}

void wait(State state) {
  running->state = state;
  if (_setjmp(running->where) == 0) _longjmp(scheduler, 1);
}

void thread_main() {
  (*body)();
  wait(State::done);
}

// The scheduler throws: a kernel's frames need not be unwound.
[[noreturn]] void stop(const std::string& what) {
  failure = std::make_exception_ptr(std::runtime_error("block " + std::to_string(blockIdx.x) + ", thread " +
                                                       std::to_string(threadIdx.x) + ": " + what));
  _longjmp(scheduler, 1);
}

void on_invalid_access(int, siginfo_t*, void*) { stop("an access to memory that is not allocated"); }

// While a kernel runs, invalid accesses are its own.
class InvalidAccesses {
 public:
  InvalidAccesses() {
    struct sigaction action = {};
    action.sa_sigaction = on_invalid_access;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    sigaction(SIGSEGV, &action, &previous_);
  }
  ~InvalidAccesses() { sigaction(SIGSEGV, &previous_, nullptr); }

 private:
  struct sigaction previous_;
};

void put_in_order(std::vector<unsigned>& numbers, std::mt19937& generator) {
  if (order_seed == 1) std::reverse(numbers.begin(), numbers.end());
  if (order_seed > 1) std::shuffle(numbers.begin(), numbers.end(), generator);
}

std::vector<unsigned> numbers_below(unsigned size) {
  std::vector<unsigned> numbers(size);
  std::iota(numbers.begin(), numbers.end(), 0u);
  return numbers;
}

// Lets all threads of [first, last) go on if every one of them waits for the others.
bool release(size_t first, size_t last, State state) {
  for (size_t i = first; i < last; ++i) {
    if (threads[i].state != state || (state == State::waits_for_block && threads[i].line != threads[first].line)) return false;
  }
  for (size_t i = first; i < last; ++i) threads[i].state = State::ready;
  return true;
}

void run_block(unsigned size, std::mt19937& generator) {
  for (unsigned i = 0; i < size; ++i) {
    Thread& thread = threads[i];
    thread.state = State::ready;
    thread.exchanges = 0;
    thread.copies.assign(1, {});
    thread.is_started = false;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack.get();
    thread.start.uc_stack.ss_size = kStackBytes;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, thread_main, 0);
  }
  std::vector<unsigned> turns = numbers_below(size);
  for (;;) {
    put_in_order(turns, generator);
    for (const unsigned i : turns) {
      if (threads[i].state != State::ready) continue;
      running = &threads[i];
      threadIdx.x = i;
      resume(*running);
      if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
    }
    if (release(0, size, State::done)) return;
    bool is_released = release(0, size, State::waits_for_block);
    for (unsigned first = 0; first < size; first += kWarp) {
      is_released |= release(first, first + kWarp, State::waits_for_warp);
    }
    if (!is_released) {
      throw std::runtime_error("block " + std::to_string(blockIdx.x) +
                               ": a barrier that not all threads reach, or a warp operation that some lanes miss");
    }
  }
}

}  // namespace

void set_order(unsigned seed) { order_seed = seed; }

void run(unsigned blocks, unsigned size, const std::function<void()>& kernel) {
  if (size % kWarp != 0) throw std::runtime_error("a block that is not whole warps");
  const InvalidAccesses invalid_accesses;
  if (threads.size() < size) threads = std::vector<Thread>(size);
  warps.resize(size / kWarp);
  body = &kernel;
  std::mt19937 generator(order_seed);
  std::vector<unsigned> sequence = numbers_below(blocks);
  put_in_order(sequence, generator);
  for (const unsigned block : sequence) {
    blockIdx.x = block;
    run_block(size, generator);
  }
}

void block_barrier(int line) {
  running->line = line;
  wait(State::waits_for_block);
}

const void* exchange(const void* given, size_t bytes) {
  if (bytes > kExchanged) fail("more than an exchange takes");
  const unsigned lane = threadIdx.x % kWarp;
  char* gifts = warps[threadIdx.x / kWarp].gifts[running->exchanges++ % 2];
  std::memcpy(gifts + lane * kExchanged, given, bytes);
  wait(State::waits_for_warp);
  return gifts;
}

void copy_later(void* to, const void* from, size_t bytes, size_t zeros) {
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0) {
    fail("an asynchronous copy that is not aligned to its size");
  }
  running->copies.back().push_back({to, from, bytes, zeros});
}

void commit_copies() { running->copies.emplace_back(); }

void wait_for_copies(size_t but_the_last) {
  auto& groups = running->copies;
  const size_t committed = groups.size() - 1, complete = committed - std::min(committed, but_the_last);
  for (size_t group = 0; group < complete; ++group) {
    for (const Copy& copy : groups[group]) {
      std::memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
      std::memset(static_cast<char*>(copy.to) + copy.bytes - copy.zeros, 0, copy.zeros);
    }
  }
  groups.erase(groups.begin(), groups.begin() + static_cast<std::ptrdiff_t>(complete));
}

void fail(const char* what) { stop(what); }

// ---- reports of -fsanitize; each begins with the place in the source ----

struct Place {
  const char* file;
  uint32_t line, column;
};

#define EMULATOR_REPORT(name, what)                                                              \
  extern "C" void __ubsan_handle_##name(const Place* place) {                                    \
    stop(std::string(what) + " at " + place->file + ":" + std::to_string(place->line));          \
  }

EMULATOR_REPORT(out_of_bounds, "an index out of bounds")
EMULATOR_REPORT(type_mismatch_v1, "a null or misaligned pointer")
EMULATOR_REPORT(shift_out_of_bounds, "a shift out of bounds")
EMULATOR_REPORT(add_overflow, "an overflow")
EMULATOR_REPORT(sub_overflow, "an overflow")
EMULATOR_REPORT(mul_overflow, "an overflow")
EMULATOR_REPORT(negate_overflow, "an overflow")
EMULATOR_REPORT(divrem_overflow, "a division by zero")

}  // namespace emulator
