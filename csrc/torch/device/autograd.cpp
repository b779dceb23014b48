// torch's autograd starts a thread for each device at the first backward of a process, and never again. A program that
// ran one on the CPU before it touched hx (which is made at its first use) would then have none for hx.
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/variable.h>

#include <chrono>
#include <future>
#include <memory>
#include <thread>
#include <vector>

#include "torch/device/memory.h"
#include "torch/device/runtime.h"

namespace hxcomm::device {
namespace {

using torch::autograd::Engine;
using torch::autograd::ReadyQueue;

// A derived class may name protected members.
struct Threads : Engine {
  static constexpr auto queues() { return &Threads::device_ready_queues_; }
  static constexpr auto pool() { return &Threads::thread_pool_shared_; }
};

// A thread that is at work for longer, in a backward that the program no longer waits for, is left alone.
constexpr std::chrono::seconds kLongestWait{2};

// The gradient of a tensor without elements by itself: the chip's thread takes it, and runs no operation.
void run_nothing_on(c10::Device chip) {
  const at::Tensor x = at::empty({0}, chip).set_requires_grad(true);
  const auto edge = torch::autograd::impl::gradient_edge(x);
  Engine::get_default_engine().execute({edge}, {at::empty({0}, chip)}, /*keep_graph=*/false, /*create_graph=*/false,
                                       /*accumulate_grad=*/true, {edge});
}

}  // namespace

void start_autograd(int chips) {
  Engine& engine = Engine::get_default_engine();
  const bool started = (engine.*Threads::pool()) != nullptr;
  auto& queues = engine.*Threads::queues();
  if (!started || !queues.empty()) return;
  // As Engine::start_device_threads() does. Nobody reads the queues of devices before there is a tensor on one.
  std::vector<std::shared_ptr<ReadyQueue>> made(static_cast<size_t>(chips));
  for (auto& queue : made) queue = std::make_shared<ReadyQueue>();
  queues = made;
  for (int chip = 0; chip < chips; ++chip)
    std::thread(&Engine::thread_init, &engine, chip, made[static_cast<size_t>(chip)], true).detach();
}

// A thread goes on for a moment after the backward that it ran has returned: it drops what it has of it, Python objects
// of the caller's thread-local state among that, and takes the GIL to do so. Python ends a thread that wants the GIL
// while the interpreter shuts down, by unwinding its stack, and as this is in a destructor, the process with SIGABRT.
// So each gets one more backward, of nothing, by a thread that has no such state: it begins when the last is dropped.
void finish_autograd() {
  const size_t chips = (Engine::get_default_engine().*Threads::queues()).size();
  auto done = std::make_shared<std::promise<void>>();
  const auto all_done = done->get_future();
  std::thread([chips, done] {
    try {
      for (size_t chip = 0; chip < chips; ++chip) run_nothing_on(c10::Device(kHx, static_cast<c10::DeviceIndex>(chip)));
    } catch (...) {  // the program is ending: it has nobody to tell, and is no worse off than without
    }
    done->set_value();
  }).detach();
  all_done.wait_for(kLongestWait);
}

}  // namespace hxcomm::device
