#include "torch/device/kernels.h"

#include <c10/core/impl/COW.h>
#include <c10/util/Exception.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <unordered_set>

#include "torch/device/memory.h"

namespace hxcomm::device {
namespace {

using c10::BackendComponent;
using c10::DispatchKey;
using c10::DispatchKeySet;

std::atomic<uint64_t> copies{0};
std::atomic<int> fallback_mode{0};

// A derived class may name a protected member: this gives the pointers to members through which a tensor is relabelled.
struct Labels : c10::TensorImpl {
  static constexpr auto keys() { return &Labels::key_set_; }
  static constexpr auto device() { return &Labels::device_opt_; }
};

constexpr DispatchKeySet kBits({DispatchKey::Conjugate, DispatchKey::Negative, DispatchKey::ZeroTensor});
constexpr DispatchKeySet kDense(DispatchKey::CPU);

DispatchKeySet hx_keys(DispatchKeySet host) {
  return host.remove_backend(BackendComponent::CPUBit).remove(DispatchKey::AutocastCPU) |
         DispatchKeySet(BackendComponent::PrivateUse1Bit) | DispatchKeySet(DispatchKey::AutocastPrivateUse1);
}

// Operators that take CPU tensors beside those of the device on CUDA, too: copies, and lengths.
bool takes_cpu_tensors(const std::string& name) {
  static const std::unordered_set<std::string> names = {"aten::copy_", "aten::_copy_from",
                                                        "aten::_copy_from_and_resize", "aten::_pack_padded_sequence",
                                                        "aten::_ctc_loss.Tensor"};
  return names.count(name) != 0;
}

std::mutex registry_mutex;
std::unordered_map<const c10::FunctionSchema*, std::unique_ptr<Operator>>& registry() {
  static auto* all = new std::unordered_map<const c10::FunctionSchema*, std::unique_ptr<Operator>>;
  return *all;
}

std::unique_ptr<Operator> describe(const c10::OperatorHandle& handle) {
  auto op = std::make_unique<Operator>();
  const c10::FunctionSchema& schema = handle.schema();
  op->name = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  op->mixes_cpu = takes_cpu_tensors(op->name);
  op->has_kernel = handle.hasComputedKernelForDispatchKey(DispatchKey::CPU);
  op->changes_arguments = schema.is_mutable();
  for (size_t i = 0; i < schema.arguments().size(); ++i) {
    const auto& type = *schema.arguments()[i].type();
    if (type.kind() == c10::TypeKind::GeneratorType ||
        (type.kind() == c10::TypeKind::OptionalType &&
         type.castRaw<c10::OptionalType>()->getElementType()->kind() == c10::TypeKind::GeneratorType))
      op->generator = static_cast<int>(i);
  }
  op->draws_default = op->generator < 0 && handle.hasTag(at::Tag::nondeterministic_seeded);
  return op;
}

}  // namespace

Operator& operator_of(const c10::OperatorHandle& handle) {
  // A map for each thread: the shared one is asked once for each operator.
  thread_local std::unordered_map<const c10::FunctionSchema*, Operator*> known;
  Operator*& op = known[&handle.schema()];
  if (op == nullptr) {
    const std::lock_guard lock(registry_mutex);
    auto& shared = registry()[&handle.schema()];
    if (!shared) shared = describe(handle);
    op = shared.get();
  }
  return *op;
}

Operator& operator_named(const char* name, const char* overload) {
  return operator_of(c10::Dispatcher::singleton().findSchemaOrThrow(name, overload));
}

std::vector<const Operator*> operators() {
  const std::lock_guard lock(registry_mutex);
  std::vector<const Operator*> all;
  for (const auto& [schema, op] : registry()) all.push_back(op.get());
  return all;
}

uint64_t output_copies() { return copies.load(std::memory_order_relaxed); }
void set_fallback_mode(int mode) { fallback_mode.store(mode, std::memory_order_relaxed); }

void before_boxed(Operator& op) {
  const uint64_t earlier = op.boxed.fetch_add(1, std::memory_order_relaxed);
  const int mode = fallback_mode.load(std::memory_order_relaxed);
  if (C10_LIKELY(mode == 0)) return;
  TORCH_CHECK_NOT_IMPLEMENTED(mode != 2, op.name, " has no fast path on hx, and HXCOMM_FALLBACK=raise");
  if (earlier == 0) TORCH_WARN(op.name, " has no fast path on hx: it runs by the general one (HXCOMM_FALLBACK=warn)");
}

HostCall::HostCall(Operator& op)
    : op_(op),
      outer_chip_(exchange_kernel_chip(-1)),
      below_autograd_(c10::autograd_dispatch_keyset_with_ADInplaceOrView | c10::autocast_dispatch_keyset) {
  check_not_forked();
}

HostCall::~HostCall() { exchange_kernel_chip(outer_chip_); }

void HostCall::enter_device(c10::Device device) {
  if (device.type() == kHx && chip_ < 0) chip_ = device.has_index() ? device.index() : current_chip();
}

at::Tensor HostCall::enter_index(const at::Tensor& tensor) {
  return tensor.defined() && tensor.is_cpu() ? tensor : enter(tensor);
}

at::Tensor HostCall::enter(const at::Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  c10::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  const c10::Device device = impl->device();
  if (device.type() != kHx) {
    if (impl->dim() > 0 || !device.is_cpu()) on_cpu_ = true;
    return tensor;
  }
  if (chip_ < 0)
    chip_ = device.index();
  else if (chip_ != device.index())
    other_chip_ = device.index();
  for (const Entry& entry : entries_)
    if (entry.original == impl) return entry.standin;
  TORCH_CHECK_NOT_IMPLEMENTED(impl->layout() == c10::kStrided, op_.name, " on hx: tensors of layout ", impl->layout(),
                              " are not supported");
  // No autograd keys: a kernel runs below autograd, and without them the tensor needs no version counter.
  auto standin = c10::make_intrusive<c10::TensorImpl>(c10::TensorImpl::VIEW, standin_of(impl->storage()),
                                                      kDense | (impl->key_set() & kBits), impl->dtype());
  standin->set_sizes_and_strides(impl->sizes(), impl->strides(), impl->storage_offset());
  if (C10_UNLIKELY(impl->is_wrapped_number())) standin->set_wrapped_number(true);
  entries_.push_back({impl, at::Tensor(std::move(standin))});
  return entries_.back().standin;
}

c10::Storage HostCall::standin_of(const c10::Storage& storage) {
  c10::StorageImpl* original = storage.unsafeGetStorageImpl();
  for (const Storage& known : storages_)
    if (known.original == original) return c10::Storage(known.standin);
  // A lazy clone shares its bytes until one of them is written to. A kernel would not know: it gets bytes of its own.
  if (C10_UNLIKELY(c10::impl::cow::is_cow_data_ptr(original->_mutable_data_ptr_no_checks()))) {
    const int before = exchange_current_chip(original->device().index());
    original->mutable_data_ptr();
    set_current_chip(before);
  }
  // Holds the storage, should a kernel keep what it was given.
  c10::raw::intrusive_ptr::incref(original);
  const auto drop = [](void* held) { c10::raw::intrusive_ptr::decref(static_cast<c10::StorageImpl*>(held)); };
  auto standin = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), static_cast<int64_t>(original->nbytes()),
      c10::DataPtr(original->_mutable_data_ptr_no_checks().get(), original, drop, c10::Device(c10::DeviceType::CPU)),
      host_allocator(), original->resizable());
  storages_.push_back({original, std::move(standin)});
  return c10::Storage(storages_.back().standin);
}

void HostCall::check() {
  if (C10_UNLIKELY(chip_ < 0)) chip_ = current_chip();
  if (C10_UNLIKELY(on_cpu_ || other_chip_ >= 0) && !op_.mixes_cpu) {
    const std::string other = other_chip_ >= 0 ? "hx:" + std::to_string(other_chip_) : "cpu";
    TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, hx:", chip_,
                " and ", other, "! (", op_.name, ")");
  }
  exchange_kernel_chip(chip_);
}

const char* HostCall::first_dtype() const {
  return entries_.empty() ? "these arguments" : c10::toString(entries_.front().standin.scalar_type());
}

void HostCall::relabel(c10::StorageImpl& storage) const {
  storage._mutable_data_ptr_no_checks().unsafe_set_device(c10::Device(kHx, static_cast<c10::DeviceIndex>(chip_)));
  storage.set_allocator(chip_allocator());
}

at::Tensor HostCall::leave(at::Tensor result) {
  if (!result.defined()) return result;
  c10::TensorImpl* impl = result.unsafeGetTensorImpl();
  for (const Entry& entry : entries_)
    if (entry.standin.unsafeGetTensorImpl() == impl)
      return at::Tensor(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(entry.original));
  TORCH_CHECK_NOT_IMPLEMENTED(impl->layout() == c10::kStrided && impl->has_storage() && !impl->is_quantized(), op_.name,
                              " on hx: a result of dtype ", impl->dtype(), " and layout ", impl->layout(),
                              " is not supported");
  c10::StorageImpl* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  for (const Storage& known : storages_)
    if (known.standin.get() == storage) return view_of(known, result);
  if (storage->device_type() != kHx) {  // else: it belongs to an earlier result of this operation
    const void* data = storage->_mutable_data_ptr_no_checks().get();
    if (C10_UNLIKELY(data != nullptr && !in_chip_memory(data))) return copied(result);
    relabel(*storage);
  }
  const c10::Device device = storage->device();
  if (C10_LIKELY(result.use_count() == 1)) {
    impl->*Labels::keys() = hx_keys(impl->key_set());
    impl->*Labels::device() = device;
    return result;
  }
  auto own = c10::make_intrusive<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(impl->storage()),
                                                  hx_keys(impl->key_set()), impl->dtype());
  own->set_sizes_and_strides(impl->sizes(), impl->strides(), impl->storage_offset());
  return at::Tensor(std::move(own));
}

// VIEW and the base's keys: a view of a normal tensor is one in inference mode, too.
at::Tensor HostCall::view_of(const Storage& storage, const at::Tensor& result) const {
  const c10::TensorImpl* impl = result.unsafeGetTensorImpl();
  const c10::TensorImpl* base = entries_.front().original;
  for (const Entry& entry : entries_)
    if (entry.original->unsafe_storage().unsafeGetStorageImpl() == storage.original) base = entry.original;
  auto view = c10::make_intrusive<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(storage.original)),
      (base->key_set() - kBits) | (impl->key_set() & kBits), impl->dtype());
  view->set_sizes_and_strides(impl->sizes(), impl->strides(), impl->storage_offset());
  return at::Tensor(std::move(view));
}

at::Tensor HostCall::copied(const at::Tensor& result) const {
  copies.fetch_add(1, std::memory_order_relaxed);
  // Allocated by the CPU's allocator of this thread, which is the chip's.
  at::Tensor copy = result.clone();
  relabel(*copy.storage().unsafeGetStorageImpl());
  c10::TensorImpl* impl = copy.unsafeGetTensorImpl();
  impl->*Labels::keys() = hx_keys(impl->key_set());
  impl->*Labels::device() = copy.storage().device();
  return copy;
}

void HostCall::commit() {
  for (const Storage& each : storages_) {
    c10::DataPtr& data = each.standin->_mutable_data_ptr_no_checks();
    if (data.get_context() == each.original) continue;  // still the original's memory
    each.original->set_data_ptr_noswap(std::move(data));
    each.original->set_nbytes(each.standin->nbytes());
    relabel(*each.original);
    // The stand-in's block now belongs to the original.
    c10::raw::intrusive_ptr::incref(each.original);
    const auto drop = [](void* held) { c10::raw::intrusive_ptr::decref(static_cast<c10::StorageImpl*>(held)); };
    each.standin->set_data_ptr_noswap(c10::DataPtr(each.original->_mutable_data_ptr_no_checks().get(), each.original,
                                                   drop, c10::Device(c10::DeviceType::CPU)));
  }
  for (const Entry& entry : entries_) {
    const c10::TensorImpl* now = entry.standin.unsafeGetTensorImpl();
    if (now->sizes() == entry.original->sizes() && now->strides() == entry.original->strides() &&
        now->storage_offset() == entry.original->storage_offset())
      continue;
    entry.original->set_sizes_and_strides(now->sizes(), now->strides(), now->storage_offset());
  }
}

}  // namespace hxcomm::device
