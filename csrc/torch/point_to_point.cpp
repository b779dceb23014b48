// send, recv and recv from any source. They begin at once whether or not anybody waits, so a batch of them cannot
// deadlock by its order.
#include "torch/process_group.h"
#include "torch/work.h"

namespace hxcomm::torch_glue {

using c10d::OpType;

ProcessGroup::WorkPtr ProcessGroup::send(List& tensors, int to, int tag) {
  Tensors call(kSend, "send");
  fill_send(call, only(tensors, call), to, tag, self());
  return issue(OpType::SEND, std::move(call), timeout_, /*async_op=*/true);
}

ProcessGroup::WorkPtr ProcessGroup::recv(List& tensors, int from, int tag) {
  Tensors call(kRecv, "recv");
  fill_recv(call, only(tensors, call), from, tag, self());
  return issue(OpType::RECV, std::move(call), timeout_, /*async_op=*/true);
}

ProcessGroup::WorkPtr ProcessGroup::recvAnysource(List& tensors, int tag) {
  Tensors call(kRecv, "recvAnySource");  // as other backends call it in a profile
  fill_recv_from_any(call, only(tensors, call), tag);
  return issue(OpType::RECVANYSOURCE, std::move(call), timeout_, /*async_op=*/true);
}

}  // namespace hxcomm::torch_glue
