// Events of the profiler on hx: torch.autograd.profiler.profile(use_device="hx") times each operator by them.
#include <torch/csrc/profiler/stubs/base.h>

#include <chrono>
#include <memory>

#include "torch/device/memory.h"
#include "torch/device/runtime.h"

namespace hxcomm::device {
namespace {

using torch::profiler::impl::ProfilerVoidEventStub;

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

struct Stubs final : torch::profiler::impl::ProfilerStubs {
  void record(c10::DeviceIndex* device, ProfilerVoidEventStub* event, int64_t* cpu_ns) const override {
    if (device != nullptr) *device = static_cast<c10::DeviceIndex>(current_chip());
    const auto time = std::make_shared<int64_t>(now_ns());
    if (cpu_ns != nullptr) *cpu_ns = *time;
    *event = time;
  }
  float elapsed(const ProfilerVoidEventStub* first, const ProfilerVoidEventStub* second) const override {
    const auto ns = *static_cast<const int64_t*>(second->get()) - *static_cast<const int64_t*>(first->get());
    return static_cast<float>(static_cast<double>(ns) / 1e3);  // microseconds
  }
  void mark(const char*) const override {}
  void rangePush(const char*) const override {}
  void rangePop() const override {}
  bool enabled() const override { return true; }
  void onEachDevice(std::function<void(int)> visit) const override { visit(current_chip()); }
  void synchronize() const override {}
};

}  // namespace

void start_profiler() {
  static Stubs stubs;
  torch::profiler::impl::registerPrivateUse1Methods(&stubs);
}

}  // namespace hxcomm::device
