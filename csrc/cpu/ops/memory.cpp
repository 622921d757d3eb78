#include "cpu/ops/memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/Allocator.h>
#include <c10/util/accumulate.h>

#include <algorithm>
#include <memory>
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
constexpr size_t kMostKept = size_t{128} << 20;

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
  // One that fits without wasting more than half of it: the last one given is the likeliest to be in the cache.
  Block take(size_t capacity) {
    {
      const std::lock_guard<std::mutex> guard(mutex_);
      for (size_t i = blocks_.size(); i-- > 0;) {
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

// Storage of tensors.
class Results final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    auto memory = std::make_unique<Buffer>(static_cast<int64_t>(bytes));
    void* const data = memory->at();
    const auto release = [](void* buffer) { delete static_cast<Buffer*>(buffer); };
    return {data, memory.release(), release, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

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

at::Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options) {
  const int64_t bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(options.dtype().itemsize());
  if (static_cast<size_t>(bytes) < kLeastShared) return at::empty(sizes, options);
  static Results* const results = new Results;  // tensors may outlive static objects
  const c10::DispatchKeySet cpu(c10::DispatchKey::CPU);
  return at::detail::empty_generic(sizes, results, cpu, c10::typeMetaToScalarType(options.dtype()), std::nullopt);
}

}  // namespace madtp::cpu
