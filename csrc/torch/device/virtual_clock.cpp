#include "torch/device/virtual_clock.h"

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <bit>
#include <chrono>
#include <mutex>
#include <unordered_map>

#include "torch/device/kernels.h"

namespace hxcomm::device {
namespace {

enum Tag : int64_t { kNone, kInteger, kReal, kList, kTensor };

constexpr size_t kKinds = 3;  // hxcomm.virtual.clock.KINDS
constexpr size_t kMostCosts = size_t{1} << 18;
constexpr size_t kMostEvents = size_t{1} << 20;

struct Cost {
  int64_t ps = 0;
  size_t kind = 0;
  std::vector<int64_t> words;  // the signature that it is of
};

struct Region {
  std::array<int64_t, kKinds> ps{};
  std::array<uint64_t, kKinds> calls{};
  int64_t exposed_ps = 0, communication_ps = 0;
};

struct Event {
  const Operator* op;
  int64_t start_ps, duration_ps, start_ns, duration_ns;
  uint16_t region;
};

struct Clock {
  std::mutex mutex;  // not held while Python is asked
  int64_t now_ps = 0;
  std::vector<Region> regions{1};
  std::unordered_map<uint64_t, Cost> costs;
  std::vector<Event> events;
  uint64_t lost_events = 0;
  std::atomic<uint16_t> region{0};
  std::atomic<bool> records{false};
  py::object cost_of;  // written once, with the GIL
};

Clock& clock() {
  static auto* one = new Clock;  // never destroyed: threads may still run when the interpreter ends
  return *one;
}

thread_local int depth = 0;

uint64_t hash_of(const Operator& op, const Signature::Words& words) {
  uint64_t hash = reinterpret_cast<uintptr_t>(&op);
  for (const int64_t word : words) {
    hash = (hash ^ static_cast<uint64_t>(word)) * 0x9E3779B97F4A7C15ull;
    hash ^= hash >> 32;
  }
  return hash;
}

// Reads a signature for Python: tensors as (shape, strides, dtype, bytes that are addressed).
class Reader {
 public:
  Reader(const int64_t* at, const int64_t* end) : at_(at), end_(end) {}

  py::list all() {
    py::list values;
    while (at_ < end_) values.append(value());
    return values;
  }

 private:
  py::object value() {
    switch (*at_++) {
      case kInteger:
        return py::int_(*at_++);
      case kReal:
        return py::float_(std::bit_cast<double>(*at_++));
      case kList: {
        py::list values;
        for (int64_t left = *at_++; left > 0; --left) values.append(value());
        return values;
      }
      case kTensor:
        return tensor();
      default:
        return py::none();
    }
  }

  py::object tensor() {
    const auto type = static_cast<at::ScalarType>(*at_++);
    const int64_t n = *at_++;
    py::tuple shape(n), strides(n);
    int64_t addressed = 1, reach = 1;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t size = at_[i], stride = at_[n + i];
      shape[static_cast<size_t>(i)] = size;
      strides[static_cast<size_t>(i)] = stride;
      if (stride != 0 || size == 0) addressed *= size;
      reach += std::max<int64_t>(size - 1, 0) * std::abs(stride);
    }
    at_ += 2 * n;
    const auto nbytes = std::min(addressed, reach) * static_cast<int64_t>(c10::elementSize(type));
    return py::make_tuple(shape, strides, c10::toString(type), nbytes);
  }

  const int64_t* at_;
  const int64_t* end_;
};

Cost ask(const Operator& op, const Signature::Words& words, size_t n_arguments) {
  const py::gil_scoped_acquire gil;
  const int64_t* results = words.data() + n_arguments;
  try {
    const auto answer =
        clock()
            .cost_of(op.name, Reader(words.data(), results).all(), Reader(results, words.data() + words.size()).all())
            .cast<std::pair<int64_t, size_t>>();
    TORCH_CHECK(answer.first >= 0 && answer.second < kKinds, "a cost of ", answer.first, " ps of kind ", answer.second);
    return {answer.first, answer.second, {words.begin(), words.end()}};
  } catch (py::error_already_set& error) {
    TORCH_CHECK(false, op.name, " has no cost on the simulated chip: ", error.what());
  }
}

}  // namespace

int64_t wall_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

int64_t clock_now_ps() {
  const std::lock_guard lock(clock().mutex);
  return clock().now_ps;
}

uint16_t clock_region() { return clock().region.load(std::memory_order_relaxed); }
bool clock_records() { return clock().records.load(std::memory_order_relaxed); }

void clock_wait_until(int64_t ps, uint16_t region) {
  const std::lock_guard lock(clock().mutex);
  if (ps <= clock().now_ps) return;
  clock().regions[region].exposed_ps += ps - clock().now_ps;
  clock().now_ps = ps;
}

void clock_communicated(int64_t ps, uint16_t region) {
  const std::lock_guard lock(clock().mutex);
  clock().regions[region].communication_ps += ps;
}

void Signature::add(const at::Tensor& tensor) {
  // A number of the program that torch wrapped: in no chip's memory.
  if (!tensor.defined() || tensor.unsafeGetTensorImpl()->is_wrapped_number()) return add_none();
  const c10::IntArrayRef sizes = tensor.sizes(), strides = tensor.strides();
  words_.push_back(kTensor);
  words_.push_back(static_cast<int64_t>(tensor.scalar_type()));
  words_.push_back(static_cast<int64_t>(sizes.size()));
  words_.append(sizes.begin(), sizes.end());
  words_.append(strides.begin(), strides.end());
}

void Signature::add(const c10::IValue& value) {
  if (value.isTensor()) {
    add(value.toTensor());
  } else if (value.isInt() || value.isBool()) {
    add(value.isInt() ? value.toInt() : static_cast<int64_t>(value.toBool()));
  } else if (value.isDouble()) {
    add(value.toDouble());
  } else if (value.isList()) {
    const auto list = value.toListRef();
    begin_list(list.size());
    for (const c10::IValue& each : list) add(each);
  } else {
    add_none();
  }
}

void Signature::add(int64_t value) { words_.append({kInteger, value}); }
void Signature::add(double value) { words_.append({kReal, std::bit_cast<int64_t>(value)}); }
void Signature::add_none() { words_.push_back(kNone); }
void Signature::begin_list(size_t size) { words_.append({kList, static_cast<int64_t>(size)}); }

void Metering::begin(const Operator& op) {
  began_ = true;
  if (depth++ > 0) return;
  op_ = &op;
  signature_.emplace();
  if (clock_records()) began_ns_ = wall_ns();
}

void Metering::leave() { --depth; }

void Metering::charge() {
  const Signature::Words& words = signature_->words();
  const uint64_t hash = hash_of(*op_, words);
  Clock& c = clock();
  std::unique_lock lock(c.mutex);
  auto found = c.costs.find(hash);
  if (C10_UNLIKELY(found == c.costs.end() ||
                   !std::equal(words.begin(), words.end(), found->second.words.begin(), found->second.words.end()))) {
    lock.unlock();
    Cost cost = ask(*op_, words, n_argument_words_);
    lock.lock();
    if (c.costs.size() >= kMostCosts) c.costs.clear();
    found = c.costs.insert_or_assign(hash, std::move(cost)).first;
  }
  const Cost& cost = found->second;
  const uint16_t in = clock_region();
  Region& region = c.regions[in];
  region.ps[cost.kind] += cost.ps;
  ++region.calls[cost.kind];
  if (C10_UNLIKELY(clock_records())) {
    if (c.events.size() < kMostEvents)
      c.events.push_back({op_, c.now_ps, cost.ps, began_ns_, wall_ns() - began_ns_, in});
    else
      ++c.lost_events;
  }
  c.now_ps += cost.ps;
}

namespace {

py::list regions() {
  py::list rows;
  for (const Region& region : clock().regions)
    rows.append(py::make_tuple(region.ps, region.calls, region.exposed_ps, region.communication_ps));
  return rows;
}

py::list events() {
  py::list rows;
  for (const Event& event : clock().events)
    rows.append(py::make_tuple(event.op->name, event.region, event.start_ps, event.duration_ps, event.start_ns,
                               event.duration_ns));
  return rows;
}

}  // namespace

void bind_virtual_clock(py::module_& m) {
  m.def(
      "clock_start",
      [](py::object cost_of, bool records) {
        clock().cost_of = std::move(cost_of);
        clock().records = records;
        clock_switch = true;
      },
      py::arg("cost_of"), py::arg("records"),
      "From now on every operation of hx costs what cost_of(name, arguments, results) says: (ps, number of its kind).");
  m.def("clock_now_ps", &clock_now_ps);
  m.def(
      "clock_enter", [](uint16_t region) { return clock().region.exchange(region, std::memory_order_relaxed); },
      py::arg("region"), "What follows counts for that region; returns the one before.");
  m.def(
      "clock_add_region",
      [] {
        const std::lock_guard lock(clock().mutex);
        TORCH_CHECK(clock().regions.size() < UINT16_MAX, "more than ", UINT16_MAX, " regions");
        clock().regions.emplace_back();
        return clock().regions.size() - 1;
      },
      "The number of a new region.");
  m.def(
      "clock_regions",
      [] {
        const std::lock_guard lock(clock().mutex);
        return regions();
      },
      "By region: ps of each kind, operations of each kind, ps of communication that shows and of all.");
  m.def(
      "clock_events",
      [] {
        const std::lock_guard lock(clock().mutex);
        return py::make_tuple(events(), clock().lost_events);
      },
      "(operator, region, start and duration in virtual ps and in wall ns) of each operation, and how many were too "
      "many to keep.");
}

}  // namespace hxcomm::device
