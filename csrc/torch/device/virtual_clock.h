// The virtual clock of this process's rank: when its operations would have ended on the chip that is simulated.
//
// Every operation of hx advances it by its cost. Costs come from Python (hxcomm/virtual/clock.py), once for each
// signature: operator, shapes, strides and dtypes. While no chip is simulated an operation pays one predicted branch.
#pragma once

#include <ATen/core/IListRef.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace hxcomm::device {

struct Operator;

inline std::atomic<bool> clock_switch{false};
inline bool clock_runs() { return C10_UNLIKELY(clock_switch.load(std::memory_order_relaxed)); }

int64_t clock_now_ps();
// What the program is in, as it says itself: a layer, say. Costs are summed up for each.
uint16_t clock_region();
// A rank waits for a collective that it issued in `region`. What the clock jumps is communication that shows.
void clock_wait_until(int64_t ps, uint16_t region);
// A collective that was issued in `region` took so long, whether anybody waited for it or not.
void clock_communicated(int64_t ps, uint16_t region);
bool clock_records();  // each operation by itself, for a trace
int64_t wall_ns();

// What an operation's cost depends on, as words: what is to be hashed and compared, and read again for Python.
class Signature {
 public:
  void add(const at::Tensor& tensor);
  void add(const c10::IValue& value);
  void add(int64_t value);
  void add(double value);
  void add_none();
  void begin_list(size_t size);

  template <class T>
  void add_any(const T& value) {
    if constexpr (std::is_same_v<T, at::Tensor> || std::is_same_v<T, c10::IValue>)
      add(value);
    else if constexpr (std::is_integral_v<T>)
      add(static_cast<int64_t>(value));
    else if constexpr (std::is_floating_point_v<T>)
      add(static_cast<double>(value));
    else
      add_none();
  }
  template <class T>
  void add_any(const std::optional<T>& value) {
    value.has_value() ? add_any(*value) : add_none();
  }
  template <class T>
  void add_any(const std::vector<T>& list) {
    begin_list(list.size());
    for (const T& each : list) add_any(each);
  }
  template <class T>
  void add_any(const c10::List<T>& list) {
    begin_list(list.size());
    for (size_t i = 0; i < list.size(); ++i) add_any(list.get(i));
  }
  template <class... T>
  void add_any(const std::tuple<T...>& all) {
    std::apply([&](const T&... each) { (add_any(each), ...); }, all);
  }

  using Words = c10::SmallVector<int64_t, 96>;
  const Words& words() const { return words_; }

 private:
  Words words_;
};

// One operation, from before its kernel until after it. An operation inside another one is part of that.
class Metering {
 public:
  explicit Metering(const Operator& op) {
    if (clock_runs()) begin(op);
  }
  ~Metering() {
    if (C10_UNLIKELY(began_)) leave();
  }
  Metering(const Metering&) = delete;
  Metering& operator=(const Metering&) = delete;

  bool counts() const { return C10_UNLIKELY(signature_.has_value()); }
  template <class T>
  void argument(const T& value) {
    signature_->add_any(value);
  }
  // All arguments have been given: results follow.
  void end_arguments() { n_argument_words_ = signature_->words().size(); }
  template <class T>
  void result(const T& value) {
    signature_->add_any(value);
  }
  void charge();  // the operation has ended well

 private:
  void begin(const Operator& op);
  void leave();

  const Operator* op_ = nullptr;
  bool began_ = false;
  size_t n_argument_words_ = 0;
  int64_t began_ns_ = 0;
  std::optional<Signature> signature_;
};

void bind_virtual_clock(py::module_& m);

}  // namespace hxcomm::device
