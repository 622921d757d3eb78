// The operations of csrc/cuda/dispatch.h on CPU tensors, through the emulator.
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <torch/csrc/utils/pybind.h>

#include "cuda/dispatch.h"
#include "cuda_runtime.h"

namespace {

// Puts every tensor against the end of its own pages, before one that may not be touched.
class GuardedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const size_t body = (bytes + kPage - 1) / kPage * kPage;
    void* pages = mmap(nullptr, body + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(pages != MAP_FAILED, "mmap of ", body + kPage, " bytes");
    char* end = static_cast<char*>(pages) + body;
    mprotect(end, kPage, PROT_NONE);
    char* data = end - (bytes + kAlignment - 1) / kAlignment * kAlignment;
    auto* mapping = new Mapping{pages, body + kPage};
    return {data, mapping, &release, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

 private:
  static constexpr size_t kPage = 4096, kAlignment = 16;

  struct Mapping {
    void* pages;
    size_t bytes;
  };

  static void release(void* context) {
    auto* mapping = static_cast<Mapping*>(context);
    munmap(mapping->pages, mapping->bytes);
    delete mapping;
  }
};

void guard_allocations(bool is_guarded) {
  static GuardedAllocator allocator;
  c10::SetCPUAllocator(is_guarded ? static_cast<c10::Allocator*>(&allocator) : c10::GetDefaultCPUAllocator());
}

}  // namespace

PYBIND11_MODULE(MODULE_NAME, m) {
  namespace cuda = madtp::cuda;
  m.def("attention", &cuda::attention);
  m.def("attention_importance", &cuda::attention_importance);
  m.def("score_tokens", &cuda::score_tokens);
  m.def("compact", &cuda::compact);
  m.def("set_order", &emulator::set_order);
  m.def("guard_allocations", &guard_allocations);
}
