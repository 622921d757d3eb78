#include "cpu/ops/memory.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace madtp::cpu {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kLeastShared = size_t{256} << 10;  // smaller blocks are kept by the thread that frees them
constexpr int kSmallBlocks = 8;                     // so many
constexpr int64_t kLeastAdvised = int64_t{32} << 20;  // what the C library always gets from the system, and gives back at once
constexpr size_t kMostKept = size_t{64} << 20;

struct Block {
  std::byte* data;
  size_t capacity;
};

size_t alignment_of(size_t capacity) { return capacity >= kHugePage ? kHugePage : 64; }

size_t capacity_for(size_t bytes) {
  const size_t unit = bytes >= kHugePage ? kHugePage : 64;
  return (bytes + unit - 1) / unit * unit;
}

Block allocate(size_t capacity) {
  const size_t alignment = alignment_of(capacity);
  void* const data = ::operator new(capacity, std::align_val_t{alignment});
#if defined(__linux__)
  if (alignment == kHugePage) madvise(data, capacity, MADV_HUGEPAGE);
#endif
  return {static_cast<std::byte*>(data), capacity};
}

void release(const Block& block) { ::operator delete(block.data, std::align_val_t{alignment_of(block.capacity)}); }

bool fits(const Block& block, size_t capacity) { return block.capacity >= capacity && block.capacity <= 2 * capacity; }

// Large blocks, of all threads.
class Shared {
 public:
  // One that fits without wasting more than half of it.
  Block take(size_t capacity) {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      for (size_t i = 0; i < blocks_.size(); ++i) {
        if (!fits(blocks_[i], capacity)) continue;
        const Block block = blocks_[i];
        blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i));
        bytes_ -= block.capacity;
        return block;
      }
    }
    return allocate(capacity);
  }

  // Keeps the block in place of the oldest ones, if it is not too large for that.
  void give(const Block& block) {
    std::vector<Block> surplus;
    if (block.capacity > kMostKept) {
      surplus.push_back(block);
    } else {
      const std::lock_guard<std::mutex> guard(mutex_);
      while (bytes_ + block.capacity > kMostKept) {
        surplus.push_back(blocks_.front());
        bytes_ -= blocks_.front().capacity;
        blocks_.erase(blocks_.begin());
      }
      blocks_.push_back(block);
      bytes_ += block.capacity;
    }
    for (const Block& each : surplus) release(each);
  }

 private:
  std::mutex mutex_;
  std::vector<Block> blocks_;
  size_t bytes_ = 0;
};

// Never destroyed: threads may outlive static objects.
Shared& shared() {
  static Shared* const instance = new Shared;
  return *instance;
}

// Small blocks, of one thread: malloc takes as long for them as the work on a small sample.
class Own {
 public:
  ~Own() { std::for_each(blocks_, blocks_ + count_, release); }

  // The last one given that fits: it is the likeliest to be in the cache.
  Block take(size_t capacity) {
    for (int i = count_ - 1; i >= 0; --i) {
      if (!fits(blocks_[i], capacity)) continue;
      const Block block = blocks_[i];
      remove(i);
      return block;
    }
    return allocate(capacity);
  }

  // Keeps the block in place of the oldest one.
  void give(const Block& block) {
    if (count_ == kSmallBlocks) {
      release(blocks_[0]);
      remove(0);
    }
    blocks_[count_++] = block;
  }

 private:
  void remove(int i) {
    std::copy(blocks_ + i + 1, blocks_ + count_, blocks_ + i);
    --count_;
  }

  Block blocks_[kSmallBlocks];
  int count_ = 0;
};

thread_local Own own;

}  // namespace

Buffer::Buffer(int64_t bytes) : data_(nullptr), capacity_(0) {
  if (bytes == 0) return;
  const size_t capacity = capacity_for(static_cast<size_t>(bytes));
  const Block block = capacity < kLeastShared ? own.take(capacity) : shared().take(capacity);
  data_ = block.data;
  capacity_ = block.capacity;
}

Buffer::~Buffer() {
  if (data_ == nullptr) return;
  if (capacity_ < kLeastShared) {
    own.give({data_, capacity_});
  } else {
    shared().give({data_, capacity_});
  }
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), capacity_(std::exchange(other.capacity_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(capacity_, other.capacity_);
  return *this;
}

void expect_large_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  if (bytes < kLeastAdvised) return;
  const auto first = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto last = (reinterpret_cast<uintptr_t>(data) + static_cast<size_t>(bytes)) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace madtp::cpu
