// torch.autocast("hx"): the casts that torch has for every accelerator, by its own lists.
#include <ATen/Functions.h>
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "torch/device/kernels.h"

#define HX_LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define HX_FP32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define HX_FP32_SET_OPT_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define HX_FP32_APPEND_DTYPE(...) KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE(__VA_ARGS__)
#define HX_PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)

namespace hxcomm::device {

void start_autocast() {
  using at::ScalarType, at::Scalar, at::Tensor, at::IntArrayRef;  // torch's lists say these without their namespace
  static torch::Library others(torch::Library::IMPL, "_", c10::DispatchKey::AutocastPrivateUse1, __FILE__, __LINE__);
  others.fallback(torch::CppFunction::makeFallthrough());
  static torch::Library m(torch::Library::IMPL, "aten", c10::DispatchKey::AutocastPrivateUse1, __FILE__, __LINE__);
  AT_FORALL_LOWER_PRECISION_FP(HX_LOWER_PRECISION)
  AT_FORALL_FP32(HX_FP32)
  AT_FORALL_FP32_SET_OPT_DTYPE(HX_FP32_SET_OPT_DTYPE)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(HX_FP32_APPEND_DTYPE)
  AT_FORALL_PROMOTE(HX_PROMOTE)
  m.impl("binary_cross_entropy",
         [](const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, int64_t) -> at::Tensor {
           TORCH_CHECK(
               false,
               "binary_cross_entropy and BCELoss are unsafe to autocast: use binary_cross_entropy_with_logits or "
               "BCEWithLogitsLoss");
         });
}

}  // namespace hxcomm::device
