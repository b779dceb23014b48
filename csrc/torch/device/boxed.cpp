// The general way to run an operator on hx: its arguments from the stack, whatever they are, and back.
#include <ATen/core/List.h>
#include <torch/library.h>

#include <unordered_set>

#include "torch/device/generator.h"
#include "torch/device/kernels.h"
#include "torch/device/memory.h"
#include "torch/device/virtual_clock.h"

namespace hxcomm::device {
namespace {

using c10::DispatchKey;
using c10::IValue;

IValue entered(HostCall& call, const IValue& value) {
  if (value.isTensor()) return call.enter(value.toTensor());
  if (value.isTensorList()) {
    const c10::List<at::Tensor> from = value.toTensorList();
    c10::List<at::Tensor> to;
    to.reserve(from.size());
    for (size_t i = 0; i < from.size(); ++i) to.push_back(call.enter(from.get(i)));
    return to;
  }
  if (value.isOptionalTensorList()) {
    const c10::List<std::optional<at::Tensor>> from = value.toOptionalTensorList();
    c10::List<std::optional<at::Tensor>> to;
    to.reserve(from.size());
    for (size_t i = 0; i < from.size(); ++i) {
      const std::optional<at::Tensor> each = from.get(i);
      to.push_back(each.has_value() ? std::optional(call.enter_index(*each)) : std::nullopt);
    }
    return to;
  }
  if (value.isDevice()) {
    call.enter_device(value.toDevice());
    return c10::Device(c10::DeviceType::CPU);
  }
  return value;
}

IValue left(HostCall& call, IValue value) {
  if (value.isTensor()) return call.leave(std::move(value).toTensor());
  if (value.isTensorList()) {
    std::vector<at::Tensor> results = std::move(value).toTensorVector();
    for (at::Tensor& result : results) result = call.leave(std::move(result));
    return results;
  }
  return value;
}

[[noreturn]] void name_dtype(const Operator& op, const HostCall& call, const c10::Error& error) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.name, " on hx does not support ", call.first_dtype(), ": ",
                              error.what_without_backtrace());
  __builtin_unreachable();
}

// Each operator that has a kernel for CPU, and another that the dispatcher would prefer to the fallback: one made of
// other operators, which costs several calls instead of one.
bool hides_the_fallback(const c10::OperatorHandle& op) {
  const auto& schema = op.schema();
  // Convolutions are made of backends that ask for the device; on CPU tensors they choose well.
  static const std::unordered_set<std::string> kConvolutions = {"aten::convolution", "aten::convolution_backward",
                                                                "aten::_convolution"};
  if (schema.overload_name().empty() && kConvolutions.count(schema.name()) != 0) return true;
  return op.hasKernelForDispatchKey(DispatchKey::CPU) && !op.hasKernelForDispatchKey(DispatchKey::PrivateUse1) &&
         (op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd) ||
          op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutogradNonFunctional));
}

}  // namespace

void run_boxed(const c10::OperatorHandle& handle, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Operator& op = operator_of(handle);
  before_boxed(op);
  if (C10_UNLIKELY(!op.has_kernel)) {  // a kernel may have been registered since
    op.has_kernel = handle.hasComputedKernelForDispatchKey(DispatchKey::CPU);
    TORCH_CHECK_NOT_IMPLEMENTED(op.has_kernel, op.name, " is not supported on hx: it has no CPU kernel");
  }
  Metering metering(op);
  HostCall call(op);
  const size_t n = handle.schema().arguments().size();
  const size_t first = stack->size() - n;
  for (size_t i = first; i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    // Most arguments are tensors or plain values; lists are rebuilt.
    if (value.isTensor() || value.isList() || value.isDevice()) value = entered(call, value);
  }
  call.check();
  if (metering.counts()) {
    for (size_t i = first; i < stack->size(); ++i) metering.argument((*stack)[i]);
    metering.end_arguments();
  }
  if (op.generator >= 0) {
    IValue& value = (*stack)[first + static_cast<size_t>(op.generator)];
    value = host_generator(value.isNone() ? std::nullopt : std::optional(value.toGenerator()), call.chip());
  }
  std::optional<BorrowedDefault> borrowed;
  if (op.draws_default) borrowed.emplace(call.chip());
  const std::vector<IValue> arguments;
  try {
    handle.redispatchBoxed(kHostKeys, stack);
  } catch (const c10::NotImplementedError& error) {
    name_dtype(op, call, error);
  }
  if (op.changes_arguments) call.commit();
  const size_t results = handle.schema().returns().size();
  for (size_t i = stack->size() - results; i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (value.isTensor() || value.isTensorList()) value = left(call, std::move(value));
    if (metering.counts()) metering.result(value);
  }
  if (metering.counts()) metering.charge();
}

void start_kernels() {
  static torch::Library fallback(torch::Library::IMPL, "_", DispatchKey::PrivateUse1, __FILE__, __LINE__);
  fallback.fallback(torch::CppFunction::makeFromBoxedFunction<&run_boxed>());
  static torch::Library direct(torch::Library::IMPL, "aten", DispatchKey::PrivateUse1, __FILE__, __LINE__);
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findSchema(name);
    if (!op.has_value() || op->schema().name().rfind("aten::", 0) != 0 || !hides_the_fallback(*op)) continue;
    direct.impl(c10::toString(name).c_str(), torch::CppFunction::makeFromBoxedFunction<&run_boxed>());
  }
}

}  // namespace hxcomm::device
