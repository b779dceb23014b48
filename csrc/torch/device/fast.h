// A fast path: runs an operator's CPU kernel without boxing its arguments. One line for each operator.
#pragma once

#include <ATen/core/IListRef.h>
#include <ATen/core/List.h>
#include <torch/library.h>

#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "torch/device/kernels.h"
#include "torch/device/virtual_clock.h"

namespace hxcomm::device {

// What is held of an argument during the call, and passed to the kernel: plain values are what they were.
template <class A>
struct Argument {
  using Held = A;
  static A enter(HostCall&, A argument) { return static_cast<A>(argument); }
};
template <>
struct Argument<const at::Tensor&> {
  using Held = at::Tensor;
  static at::Tensor enter(HostCall& call, const at::Tensor& tensor) { return call.enter(tensor); }
};
template <>
struct Argument<at::Tensor&> : Argument<const at::Tensor&> {};
template <>
struct Argument<const std::optional<at::Tensor>&> {
  using Held = std::optional<at::Tensor>;
  static Held enter(HostCall& call, const Held& tensor) {
    return tensor.has_value() ? std::optional(call.enter(*tensor)) : std::nullopt;
  }
};
template <>
struct Argument<const at::ITensorListRef&> {
  using Held = std::vector<at::Tensor>;
  static Held enter(HostCall& call, const at::ITensorListRef& tensors) {
    Held held;
    held.reserve(tensors.size());
    for (const at::Tensor& tensor : tensors) held.push_back(call.enter(tensor));
    return held;
  }
};
template <>
struct Argument<const c10::List<std::optional<at::Tensor>>&> {
  using Held = c10::List<std::optional<at::Tensor>>;
  static Held enter(HostCall& call, const Held& tensors) {
    Held held;
    held.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
      const std::optional<at::Tensor> index = tensors.get(i);
      held.push_back(index.has_value() ? std::optional(call.enter_index(*index)) : std::nullopt);
    }
    return held;
  }
};

inline at::Tensor leave(HostCall& call, at::Tensor&& tensor) { return call.leave(std::move(tensor)); }
template <class T>
T leave(HostCall&, T&& value) {
  return std::forward<T>(value);
}
template <class... T>
std::tuple<T...> leave(HostCall& call, std::tuple<T...>&& all) {
  return std::apply([&](T&... each) { return std::tuple<T...>(leave(call, std::move(each))...); }, all);
}

template <class Op, class Schema = typename Op::schema>
struct Fast;

template <class Op, class R, class... A>
struct Fast<Op, R(A...)> {
  static R run(A... arguments) {
    static Operator& op = operator_named(Op::name, Op::overload_name);
    op.fast.fetch_add(1, std::memory_order_relaxed);
    Metering metering(op);
    HostCall call(op);
    std::tuple<typename Argument<A>::Held...> held{Argument<A>::enter(call, static_cast<A>(arguments))...};
    call.check();
    if (metering.counts()) {
      metering.argument(held);
      metering.end_arguments();
    }
    const auto kernel = [](auto&... each) -> R { return Op::redispatch(kHostKeys, each...); };
    if constexpr (std::is_same_v<R, at::Tensor&>) {  // in place: shape and storage stay
      std::apply(kernel, held);
      if (metering.counts()) {
        metering.result(std::get<0>(held));
        metering.charge();
      }
      return std::get<0>(std::tuple<A&...>(arguments...));
    } else {
      R result = leave(call, std::apply(kernel, held));
      if (metering.counts()) {
        metering.result(result);
        metering.charge();
      }
      return result;
    }
  }
};

template <class... Ops>
void register_fast(torch::Library& library) {
  const auto one = [&](std::string name, const char* overload, auto function) {
    if (*overload != 0) name += std::string(".") + overload;
    library.impl(name.c_str(), function);
  };
  (one(Ops::name, Ops::overload_name, &Fast<Ops>::run), ...);
}

}  // namespace hxcomm::device
