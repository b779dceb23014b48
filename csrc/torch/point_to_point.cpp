// send, recv and recv from any source. They begin at once whether or not anybody waits, so a batch of them cannot
// deadlock by its order.
#include "torch/process_group.h"
#include "torch/work.h"

namespace hxcomm::torch_glue {

using c10d::OpType;

ProcessGroup::WorkPtr ProcessGroup::send(List& tensors, int to, int tag) {
  Tensors call(kSend, "send");
  call.set_peer(to, tag, getSize());
  call.add_one(tensors, /*output=*/false);
  return issue(OpType::SEND, std::move(call), timeout_, /*async_op=*/true);
}

ProcessGroup::WorkPtr ProcessGroup::recv(List& tensors, int from, int tag) {
  Tensors call(kRecv, "recv");
  call.set_peer(from, tag, getSize());
  call.add_one(tensors, /*output=*/true);
  return issue(OpType::RECV, std::move(call), timeout_, /*async_op=*/true);
}

ProcessGroup::WorkPtr ProcessGroup::recvAnysource(List& tensors, int tag) {
  Tensors call(kRecv, "recvAnySource");  // as other backends call it in a profile
  call.set_any_peer(tag);
  call.add_one(tensors, /*output=*/true);
  return issue(OpType::RECVANYSOURCE, std::move(call), timeout_, /*async_op=*/true);
}

}  // namespace hxcomm::torch_glue
