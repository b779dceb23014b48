// What torch asks of a device apart from running operations: current device, streams, events, generators, hooks.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "torch/device/generator.h"
#include "torch/device/memory.h"
#include "torch/device/runtime.h"
#include "torch/device/virtual_clock.h"

namespace hxcomm::device {
namespace {

constexpr size_t kMaxChips = 128;  // c10::DeviceIndex has 8 bits

thread_local std::array<c10::StreamId, kMaxChips> thread_streams{};
std::atomic<c10::StreamId> last_stream{0};

struct Event {
  int64_t recorded_ns = 0;  // by the wall clock
  int64_t recorded_ps = 0;  // by the virtual clock, where it runs
  bool is_virtual = false;
};

// Registered in `import torch`, before there is a device: until then it says that there are no chips, so torch's
// autograd starts no threads for them, and what needs the device makes it. Every operation is finished when its call
// returns, so every stream is always idle, and an event is its time.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kHx; }
  c10::Device exchangeDevice(c10::Device device) const override { return hx(exchange_current_chip(of(device))); }
  c10::Device getDevice() const override { return hx(current_chip()); }
  void setDevice(c10::Device device) const override { set_current_chip(of(device)); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0 && device.index() < memory().chips) set_current_chip(device.index());
  }
  c10::DeviceIndex deviceCount() const noexcept override { return static_cast<c10::DeviceIndex>(memory().chips); }

  c10::Stream getStream(c10::Device device) const override {
    ensure_started();
    return stream(device, thread_streams[static_cast<size_t>(of(device))]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return stream(device, 0); }
  c10::Stream getNewStream(c10::Device device, int) const override {
    ensure_started();
    return stream(device, ++last_stream);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    c10::StreamId& current = thread_streams[static_cast<size_t>(of(s.device()))];
    return stream(s.device(), std::exchange(current, s.id()));
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(c10::DeviceIndex) const override {}

  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    ensure_started();
    if (*event == nullptr) *event = new Event;
    auto& to = *static_cast<Event*>(*event);
    to.is_virtual = clock_runs();
    if (to.is_virtual)
      to.recorded_ps = clock_now_ps();
    else
      to.recorded_ns = wall_ns();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void* first, void* second, c10::DeviceIndex) const override {
    TORCH_CHECK(first != nullptr && second != nullptr, "elapsed_time() needs two events that have been recorded");
    const auto& from = *static_cast<Event*>(first);
    const auto& to = *static_cast<Event*>(second);
    TORCH_CHECK(from.is_virtual == to.is_virtual,
                "elapsed_time() of two events, of which one was recorded before a chip was simulated");
    return to.is_virtual ? static_cast<double>(to.recorded_ps - from.recorded_ps) / 1e9
                         : static_cast<double>(to.recorded_ns - from.recorded_ns) / 1e6;
  }
  c10::DeviceCapability getDeviceCapability(c10::Device) const override { return {}; }

 private:
  static c10::Device hx(int chip) { return {kHx, static_cast<c10::DeviceIndex>(chip)}; }
  static int of(c10::Device device) { return device.has_index() ? device.index() : current_chip(); }
  static c10::Stream stream(c10::Device device, c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, hx(of(device)), id);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return is_started(); }
  void init() const override { ensure_started(); }
  c10::DeviceIndex deviceCount() const override { return static_cast<c10::DeviceIndex>(memory().chips); }
  void setCurrentDevice(c10::DeviceIndex chip) const override { set_current_chip(chip); }
  c10::DeviceIndex getCurrentDevice() const override { return static_cast<c10::DeviceIndex>(current_chip()); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex chip) const override {
    return static_cast<c10::DeviceIndex>(exchange_current_chip(chip));
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex chip) const override {
    return chip < 0 ? getCurrentDevice() : exchangeDevice(chip);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex chip) const override { return default_generator(chip); }
  at::Generator getNewGenerator(c10::DeviceIndex chip) const override { return new_generator(chip); }
  at::Device getDeviceFromPtr(void* data) const override {
    ensure_started();
    TORCH_CHECK(in_chip_memory(data), "the address does not lie in the memory of a chip");
    const auto offset = static_cast<uint64_t>(static_cast<char*>(data) - memory().base);
    return {kHx, static_cast<c10::DeviceIndex>(offset / memory().nbytes)};
  }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t nbytes) const override {
    const int before = exchange_current_chip(storage.device().index());
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), nbytes);
    set_current_chip(before);
  }
};

}  // namespace

void prepare_runtime() {
  static Guard guard;
  static c10::impl::DeviceGuardImplRegistrar registrar(kHx, &guard);
  at::RegisterPrivateUse1HooksInterface(new Hooks);
}

}  // namespace hxcomm::device
