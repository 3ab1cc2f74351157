// A CUDA device whose memory is the CPU's, for torch's CPU build.
//
// Tensors that say they are on CUDA lie in host memory. An operator on them is handed to the CPU's
// kernel, which sees the same memory through CPU tensors, and its results are put back on CUDA.

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <cstring>
#include <vector>

namespace {

using c10::DispatchKey;
using c10::IValue;
using c10::Storage;

const c10::Device cpu(c10::kCPU), cuda(c10::kCUDA, 0);

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* start = nullptr;
    TORCH_CHECK(posix_memalign(&start, 256, bytes ? bytes : 1) == 0, "out of memory");
    memset(start, 0xFF, bytes);  // NaN in every floating type, an index out of bounds in the others
    return {start, start, &std::free, cuda};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    memcpy(to, from, bytes);
  }
} memory;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  using Stream = c10::Stream;
  const Stream current{Stream::DEFAULT, cuda};
  c10::Device getDevice() const override { return cuda; }
  c10::Device exchangeDevice(c10::Device) const override { return cuda; }
  Stream getStream(c10::Device) const noexcept override { return current; }
  Stream exchangeStream(Stream) const noexcept override { return current; }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
} guard;

// ---- the same memory on another device

Storage shared(const Storage& storage, c10::Device device) {
  auto forget = [](void* owner) { delete static_cast<Storage*>(owner); };
  c10::DataPtr start(const_cast<void*>(storage.data()), new Storage(storage), forget, device);
  c10::Allocator* allocator = device == cuda ? &memory : c10::GetCPUAllocator();
  return c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage.nbytes(), std::move(start), allocator, true);
}

at::Tensor tensor_in(const Storage& storage, const at::Tensor& like) {
  auto key = storage.device() == cuda ? DispatchKey::CUDA : DispatchKey::CPU;
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      Storage(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(
      like.sizes(), like.strides(), like.storage_offset());
  return made;
}

at::Tensor on_cpu(const at::Tensor& x) {
  return x.defined() && x.is_cuda() ? tensor_in(shared(x.storage(), cpu), x) : x;
}

IValue on_cpu(const IValue& value) {
  if (value.isTensor()) return on_cpu(value.toTensor());
  if (value.isStorage()) return shared(value.toStorage(), cpu);
  if (value.isDevice() && value.toDevice().is_cuda()) return cpu;
  if (value.isTensorList()) {
    c10::List<at::Tensor> moved;
    for (const at::Tensor& x : value.toTensorVector()) moved.push_back(on_cpu(x));
    return moved;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> moved;
    for (std::optional<at::Tensor> x : value.toOptionalTensorList())
      moved.push_back(x ? std::optional(on_cpu(*x)) : std::nullopt);
    return moved;
  }
  return value;
}

// ---- one operator

class Call {
 public:
  Call(const c10::FunctionSchema& schema, std::vector<IValue> arguments)
      : schema(schema), arguments(std::move(arguments)) {
    for (const IValue& value : this->arguments) note(value);
  }

  // An error on a GPU, too; what copies or indexes across devices is let through.
  void check_devices() const {
    const std::string& name = schema.name();
    if (name == "aten::copy_" || name.find("index") != std::string::npos) return;
    TORCH_CHECK(storages.empty() || !has_cpu, "Expected all tensors to be on the same device, but ",
                name, " got some on cpu and some on cuda:0");
  }

  // A CPU tensor on CUDA: in the storage of the argument that it is a view of, if there is one.
  at::Tensor back(const at::Tensor& x) const {
    if (!x.defined()) return x;
    for (const Storage& storage : storages)
      if (storage.data() && storage.data() == x.storage().data()) return tensor_in(storage, x);
    return tensor_in(shared(x.storage(), cuda), x);
  }

  // What an operator wrote to may have another size or storage than before.
  void settle(const at::Tensor& before, const at::Tensor& after) const {
    if (!before.defined() || !before.is_cuda()) return;
    auto* tensor = before.unsafeGetTensorImpl();
    if (before.storage().data() != after.storage().data())
      tensor->set_storage_keep_dtype(back(after).storage());
    tensor->set_sizes_and_strides(after.sizes(), after.strides(), after.storage_offset());
  }

  void settle(const torch::jit::Stack& after) const {
    for (size_t i = 0; i < arguments.size(); ++i) {
      if (!writes(schema.arguments()[i])) continue;
      if (arguments[i].isTensor()) settle(arguments[i].toTensor(), after[i].toTensor());
      if (!arguments[i].isTensorList()) continue;
      auto before = arguments[i].toTensorVector(), now = after[i].toTensorVector();
      for (size_t j = 0; j < before.size(); ++j) settle(before[j], now[j]);
    }
  }

  IValue result(const c10::Argument& declared, const IValue& value) const {
    if (writes(declared))  // the written argument itself
      for (size_t i = 0; i < arguments.size(); ++i)
        if (writes(schema.arguments()[i]) &&
            *schema.arguments()[i].alias_info() == *declared.alias_info())
          return arguments[i];
    if (value.isTensor()) return back(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<at::Tensor> moved;
    for (const at::Tensor& x : value.toTensorVector()) moved.push_back(back(x));
    return moved;
  }

 private:
  static bool writes(const c10::Argument& x) { return x.alias_info() && x.alias_info()->isWrite(); }

  void note(const at::Tensor& x) {
    if (!x.defined()) return;
    if (x.is_cuda()) storages.push_back(x.storage());
    has_cpu |= x.is_cpu() && x.dim() > 0;
  }

  void note(const IValue& value) {
    if (value.isTensor()) note(value.toTensor());
    if (value.isStorage()) storages.push_back(value.toStorage());
    if (value.isTensorList())
      for (const at::Tensor& x : value.toTensorVector()) note(x);
  }

  const c10::FunctionSchema& schema;
  std::vector<IValue> arguments;
  std::vector<Storage> storages;  // of the arguments on CUDA
  bool has_cpu = false;           // an argument on the CPU, other than a number
};

void on_the_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto first = stack->end() - schema.arguments().size();
  Call call(schema, {first, stack->end()});
  call.check_devices();
  torch::jit::Stack moved;
  for (auto value = first; value != stack->end(); ++value) moved.push_back(on_cpu(*value));
  stack->erase(first, stack->end());
  torch::jit::Stack results(moved);
  op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), &results);
  if (schema.name().rfind("aten::empty", 0) == 0)
    for (const IValue& made : results)
      memset(made.toTensor().mutable_data_ptr(), 0xFF, made.toTensor().storage().nbytes());
  call.settle(moved);
  for (size_t i = 0; i < results.size(); ++i)
    stack->push_back(call.result(schema.returns()[i], results[i]));
}

// ---- what torch asks for where there is a GPU

struct Register {
  Register() {
    c10::SetAllocator(c10::kCUDA, &memory, 100);
    auto& dispatcher = c10::Dispatcher::singleton();
    auto kernel = [] { return c10::KernelFunction::makeFromBoxedFunction<&on_the_cpu>(); };
    kept.push_back(dispatcher.registerFallback(DispatchKey::CUDA, kernel(), "fake_cuda"));
    // torch decomposes these, or has kernels for all devices that look at the device
    for (c10::OperatorName name : {c10::OperatorName("aten::copy_", "")})
      kept.push_back(dispatcher.registerImpl(
          name, DispatchKey::CUDA, kernel(), std::nullopt, nullptr, "fake_cuda"));
  }
  std::vector<c10::RegistrationHandleRAII> kept;
};

c10::impl::DeviceGuardImplRegistrar register_guard(c10::kCUDA, &guard);
Register registrations;

}  // namespace

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
  void deviceSynchronize(DeviceIndex) const override {}
  Device getDeviceFromPtr(void*) const override { return Device(kCUDA, 0); }
  const Generator& getDefaultGenerator(DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};
REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at
