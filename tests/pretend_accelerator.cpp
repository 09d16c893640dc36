// A pretend accelerator for torch. Its memory is the host's, so that its numbers are real, but for torch it is a device of
// its own: tensors of two devices do not mix, every kernel is counted, and so is every time that the host would wait for it.
//
// Each operator runs on the CPU, on views of the same memory (run_on_host). Only what has no such form is written out.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/SDPBackend.h>
#include <ATen/autocast_mode.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <limits>
#include <map>
#include <mutex>
#include <set>

using at::Tensor;
using Counts = std::map<std::string, int64_t>;

namespace {

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(TYPE, 0);

// ---------------------------------------------------------------------------------------------------------- what is counted

std::mutex counts_lock;
Counts kernels, copies, synchronisations;
std::string sync_debug_mode = "default";  // or "warn", "error", as of torch.cuda.set_sync_debug_mode
bool has_float64 = true;
std::atomic<int64_t> used_bytes{0}, peak_bytes{0}, capacity{int64_t{8} << 30};

void count(Counts& counts, const std::string& name) {
  std::lock_guard<std::mutex> guard(counts_lock);
  counts[name]++;
}

// Copies to the host that do not block. They are carried out when the host waits for the device, and not before: who reads
// the values too early finds NaN (or -1), as on a card he finds whatever was there.
struct PendingCopy {
  Tensor destination, values;
};
std::vector<PendingCopy> pending_copies;

void finish_copies() {
  std::vector<PendingCopy> ready;
  {
    std::lock_guard<std::mutex> guard(counts_lock);
    ready.swap(pending_copies);
  }
  for (auto& copy : ready) copy.destination.copy_(copy.values);
}

void synchronise(const std::string& cause) {
  TORCH_CHECK(sync_debug_mode != "error", "called a synchronizing operation: ", cause);
  if (sync_debug_mode == "warn") TORCH_WARN("called a synchronizing operation: ", cause);
  count(synchronisations, cause);
  finish_copies();
}

// ------------------------------------------------------------------------------------------------------------------- memory

struct Block {
  void* data;
  int64_t bytes;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  used_bytes -= block->bytes;
  c10::free_cpu(block->data);
  delete block;
}

struct DeviceMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto size = static_cast<int64_t>(bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, used_bytes + size <= capacity, "the pretend accelerator is out of memory: ",
                     size, " bytes were asked for, ", used_bytes.load(), " of ", capacity.load(), " are in use");
    used_bytes += size;
    peak_bytes = std::max(peak_bytes.load(), used_bytes.load());
    auto* block = new Block{c10::alloc_cpu(bytes), size};
    return {block->data, block, &free_block, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
DeviceMemory device_memory;
REGISTER_ALLOCATOR(TYPE, &device_memory);

// Pinned memory is host memory that the allocator remembers.
std::mutex pinned_lock;
std::map<char*, size_t> pinned_blocks;

void free_pinned(void* data) {
  {
    std::lock_guard<std::mutex> guard(pinned_lock);
    pinned_blocks.erase(static_cast<char*>(data));
  }
  c10::free_cpu(data);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::alloc_cpu(bytes);
    std::lock_guard<std::mutex> guard(pinned_lock);
    if (data) pinned_blocks[static_cast<char*>(data)] = bytes;
    return {data, data, &free_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
PinnedMemory pinned_memory;

bool is_pinned(const void* pointer) {
  std::lock_guard<std::mutex> guard(pinned_lock);
  auto* data = static_cast<char*>(const_cast<void*>(pointer));
  auto after = pinned_blocks.upper_bound(data);
  if (after == pinned_blocks.begin()) return false;
  auto block = std::prev(after);
  return data < block->first + block->second;
}

// ------------------------------------------------------------------------------------------------ the device as torch sees it

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  // Work is done when it is asked for, in whatever stream. Only copies to the host wait (finish_copies).
  c10::Stream stream(c10::StreamId id) const { return c10::Stream(c10::Stream::UNSAFE, DEVICE, id); }
  c10::Stream getStream(c10::Device) const override { return stream(current_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(++streams); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(++streams); }
  c10::Stream exchangeStream(c10::Stream next) const override {
    return stream(std::exchange(current_stream, next.id()));
  }
  bool queryStream(const c10::Stream&) const override { return pending_copies.empty(); }
  void synchronizeStream(const c10::Stream&) const override { synchronise("stream"); }
  void synchronizeDevice(const c10::DeviceIndex) const override { synchronise("device"); }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*event) *event = new char;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<char*>(event); }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {  // who asks again finds the work done
    bool done = pending_copies.empty();
    finish_copies();
    return done;
  }
  void synchronizeEvent(void*) const override { synchronise("event"); }

  static thread_local c10::StreamId current_stream;
  static std::atomic<int64_t> streams;
};
thread_local c10::StreamId Guard::current_stream = 0;
std::atomic<int64_t> Guard::streams{0};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Generator final : at::CPUGeneratorImpl {
  Generator() : at::CPUGeneratorImpl(c10::default_rng_seed_val) {
    device_ = DEVICE;
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

at::Generator& default_generator() {
  static at::Generator generator = at::make_generator<Generator>();
  return generator;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<Generator>(); }
  at::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto data = device_memory.allocate(bytes);
    if (size_t kept = std::min(bytes, storage.nbytes())) std::memcpy(data.get(), storage.data(), kept);
    storage.unsafeGetStorageImpl()->set_data_ptr(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// ------------------------------------------------------------------------------------------------------ tensors of the device

bool is_here(const Tensor& tensor) { return tensor.device().type() == TYPE; }

void check_dtype(at::ScalarType dtype) {
  TORCH_CHECK_TYPE(has_float64 || (dtype != at::kDouble && dtype != at::kComplexDouble),
                   "the pretend accelerator has no float64 here, as MPS has none. Please use float32 instead.");
}

Tensor empty(c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>,
             std::optional<bool>, std::optional<at::MemoryFormat> format) {
  check_dtype(c10::dtype_or_default(dtype));
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(sizes, &device_memory, keys, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  check_dtype(c10::dtype_or_default(dtype));
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(sizes, strides, &device_memory, keys, c10::dtype_or_default(dtype));
}

Tensor& set_storage(Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(storage);
  impl->set_storage_offset(offset);
  impl->set_sizes_and_strides(sizes, strides);
  return self;
}

Tensor& set_whole_storage(Tensor& self, at::Storage storage) {
  auto elements = static_cast<int64_t>(storage.nbytes()) / static_cast<int64_t>(self.itemsize());
  return set_storage(self, storage, 0, {elements}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// The same memory as a tensor of the CPU, with the same sizes, strides and offset.
Tensor on_host(const Tensor& tensor) {
  if (!tensor.defined() || !is_here(tensor)) return tensor;
  const auto& storage = tensor.storage();
  c10::Storage memory(c10::Storage::use_byte_size_t(), storage.nbytes(),
                      c10::DataPtr(storage.mutable_data(), c10::Device(c10::DeviceType::CPU)), at::getCPUAllocator(), true);
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(memory), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                         tensor.dtype());
  result.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  if (tensor.is_conj()) result._set_conj(true);
  return result;
}

Tensor to_device(const Tensor& values) {
  if (!values.defined() || is_here(values)) return values;
  auto result = empty_strided(values.sizes(), values.strides(), values.scalar_type(), {}, {}, {});
  on_host(result).copy_(values);
  return result;
}

const Tensor& resize(const Tensor& self, c10::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  auto needed = (c10::multiply_integers(sizes) + self.storage_offset()) * static_cast<int64_t>(self.itemsize());
  if (needed > static_cast<int64_t>(self.storage().nbytes()))
    static_cast<const Hooks&>(at::detail::getPrivateUse1Hooks()).resizePrivateUse1Bytes(self.storage(), needed);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(sizes);
  return self;
}

// A copy between host and device blocks unless it is asked not to and the host's memory is pinned, as on CUDA.
Tensor copy_from(const Tensor& self, const Tensor& destination, bool non_blocking) {
  if (is_here(self) && is_here(destination)) {
    count(kernels, "aten::copy_");
  } else if (is_here(self)) {
    count(copies, "to the host");
    if (non_blocking && is_pinned(destination.const_data_ptr())) {
      auto values = on_host(self).clone();
      destination.fill_(destination.is_floating_point() ? std::numeric_limits<double>::quiet_NaN() : -1.0);
      std::lock_guard<std::mutex> guard(counts_lock);
      pending_copies.push_back({destination, values});
      return destination;
    }
    synchronise("copy to the host");
  } else {
    count(copies, "to the device");
    if (!non_blocking) synchronise("copy to the device");
    else if (self.numel() && !is_pinned(self.const_data_ptr())) synchronise("copy to the device from memory that is not pinned");
  }
  on_host(destination).copy_(on_host(self));
  return destination;
}

Tensor copy_from_and_resize(const Tensor& self, const Tensor& destination) {
  if (destination.sizes() != self.sizes()) destination.resize_(self.sizes());
  return copy_from(self, destination, false);
}

at::Scalar item(const Tensor& self) {
  synchronise("item");
  return at::_local_scalar_dense(on_host(self));
}

void record_stream(Tensor&, at::Stream) {}

// ------------------------------------------------------------------------------------------------------------- all operators

// On CUDA these wait for the device: the size of their result depends on values, or a value is checked on the host.
const std::set<std::string> SYNCHRONISING = {
    "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_consecutive", "aten::unique_dim",
    "aten::equal", "aten::bincount", "aten::_linalg_svd", "aten::_linalg_eigh", "aten::linalg_eig",
    "aten::multinomial"};
// These take indices that lie on the host and copy them.
const std::set<std::string> INDEXING = {"aten::index", "aten::_index_put_impl_"};

// Why this call would make the host wait, or nothing.
std::string cause_of_waiting(const std::string& name, const std::vector<Tensor>& tensors, const torch::jit::Stack& arguments) {
  if (SYNCHRONISING.count(name)) return name;
  if (name == "aten::repeat_interleave" && arguments.size() == 2 && arguments[1].isNone()) return name;  // no output_size
  if (name != "aten::_index_put_impl_") return "";  // aten::index calls nonzero and copies for itself
  for (const auto& index : arguments[1].toListRef()) {
    if (index.isNone() || !index.toTensor().defined()) continue;
    if (!is_here(index.toTensor())) return "aten::index_put_ with indices that lie on the host";
    bool filled = tensors.back().numel() == 1;  // CUDA fills the masked places
    if (index.toTensor().scalar_type() == at::kBool && !filled) return "aten::index_put_ with a mask";
  }
  return "";
}

std::vector<Tensor> tensors_of(const torch::jit::Stack& arguments) {
  std::vector<Tensor> tensors;
  for (const auto& argument : arguments) {
    if (argument.isTensor()) tensors.push_back(argument.toTensor());
    if (argument.isTensorList() || argument.isOptionalTensorList())
      for (const auto& item : argument.toListRef())
        if (item.isTensor()) tensors.push_back(item.toTensor());
  }
  return tensors;
}

void check_devices(const std::string& name, const std::vector<Tensor>& tensors) {
  for (const auto& tensor : tensors) {
    bool allowed = !tensor.defined() || is_here(tensor) || tensor.dim() == 0 || INDEXING.count(name);
    TORCH_CHECK(allowed, "Expected all tensors to be on the same device, but found at least two devices, ", DEVICE, " and ",
                tensor.device(), "! (in ", name, ")");
  }
}

// The tensors of one call: each one's view on the host, so that results can be told from arguments.
struct Call {
  std::vector<std::pair<Tensor, Tensor>> views;  // on the device, on the host
  std::vector<std::pair<at::Generator, at::Generator>> generators;

  Tensor host(const Tensor& tensor) {
    if (!tensor.defined() || !is_here(tensor)) return tensor;
    for (const auto& [here, there] : views)
      if (here.is_same(tensor)) return there;
    views.emplace_back(tensor, on_host(tensor));
    return views.back().second;
  }

  // The CPU's operators take only the CPU's generators: theirs gets the state of ours, and gives it back in the end.
  at::Generator host(const c10::IValue& generator) {
    auto own = generator.isNone() ? default_generator() : generator.toGenerator();
    TORCH_CHECK(own.device().type() == TYPE, "Expected a '", DEVICE.type(), "' device type for generator but found '",
                own.device().type(), "'");
    generators.emplace_back(own, at::detail::createCPUGenerator());
    generators.back().second.set_state(own.get_state());
    return generators.back().second;
  }

  c10::IValue to_host(const c10::IValue& argument, const c10::Argument& declared) {
    if (argument.isTensor()) return host(argument.toTensor());
    if (argument.isTensorList()) {
      c10::List<Tensor> list;
      for (const auto& item : argument.toListRef()) list.push_back(host(item.toTensor()));
      return list;
    }
    if (argument.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const auto& item : argument.toListRef())
        list.push_back(item.isNone() || !item.toTensor().defined() ? std::nullopt : std::optional<Tensor>(host(item.toTensor())));
      return list;
    }
    if (argument.isDevice()) return c10::Device(c10::DeviceType::CPU);
    static const auto generator_type = c10::OptionalType::create(c10::GeneratorType::get());
    if (declared.type()->isSubtypeOf(*generator_type)) return host(argument);
    return argument;
  }

  // A result is an argument that was written to, a view of an argument, or new.
  Tensor to_device(const Tensor& result) {
    if (!result.defined()) return result;
    for (const auto& [here, there] : views)
      if (there.is_same(result)) return here;
    for (const auto& [here, there] : views) {
      if (!there.storage().is_alias_of(result.storage()) || !result.storage().data()) continue;
      auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(here.storage()), here.key_set(),
                                                           result.dtype());
      view.unsafeGetTensorImpl()->set_storage_offset(result.storage_offset());
      view.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides());
      return view;
    }
    return ::to_device(result);
  }

  c10::IValue to_device(const c10::IValue& result) {
    if (result.isTensor()) return to_device(result.toTensor());
    if (!result.isTensorList()) return result;
    c10::List<Tensor> list;
    for (const auto& item : result.toListRef()) list.push_back(to_device(item.toTensor()));
    return list;
  }

  void finish() {
    for (auto& [own, used] : generators) own.set_state(used.get_state());
    for (auto& [here, there] : views) {  // an operator may resize what it is given as out=
      if (there.sizes() == here.sizes() && there.storage().data() == here.storage().data()) continue;
      here.resize_(there.sizes());
      on_host(here).copy_(there);
    }
  }
};

bool is_view(const c10::FunctionSchema& schema) {
  const auto& returns = schema.returns();
  return !returns.empty() && returns[0].alias_info() && !returns[0].alias_info()->isWrite();
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  auto arguments = torch::jit::pop(*stack, schema.arguments().size());
  auto tensors = tensors_of(arguments);
  check_devices(schema.name(), tensors);
  if (auto cause = cause_of_waiting(schema.name(), tensors, arguments); !cause.empty()) synchronise(cause);
  if (!is_view(schema)) count(kernels, schema.name());

  Call call;
  for (size_t i = 0; i < arguments.size(); i++) stack->push_back(call.to_host(arguments[i], schema.arguments()[i]));
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  call.finish();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) (*stack)[i] = call.to_device((*stack)[i]);
}

// ------------------------------------------------------------------------------- operators that each device writes for itself

Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, c10::IntArrayRef stride,
                   c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding,
                   int64_t groups) {
  count(kernels, "aten::convolution");
  auto added = bias ? on_host(*bias) : Tensor();
  return to_device(at::convolution(on_host(input), on_host(weight), added, stride, padding, dilation, transposed,
                                   output_padding, groups));
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                                        c10::IntArrayRef stride, c10::IntArrayRef padding,
                                                        c10::IntArrayRef dilation, bool transposed,
                                                        c10::IntArrayRef output_padding, int64_t groups,
                                                        std::array<bool, 3> wanted) {
  count(kernels, "aten::convolution_backward");
  std::vector<int64_t> bias_sizes = {grad.size(1)};
  auto [input_grad, weight_grad, bias_grad] =
      at::convolution_backward(on_host(grad), on_host(input), on_host(weight), bias_sizes, stride, padding, dilation,
                               transposed, output_padding, groups, wanted);
  return {to_device(input_grad), to_device(weight_grad), to_device(bias_grad)};
}

// The CPU has no histogram of integers.
Tensor histogram(const Tensor& self, int64_t bins, const at::Scalar& low, const at::Scalar& high) {
  if (low.toDouble() == high.toDouble()) synchronise("aten::histc");  // the limits are read from the values
  count(kernels, "aten::histc");
  return to_device(at::histc(on_host(self).to(at::kDouble), bins, low, high).to(self.scalar_type()));
}

// Attention in one kernel forward and one backward, as flash attention on CUDA, where the CPU's flash attention can do it.
int64_t choose_attention(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                         double dropout, bool, std::optional<double>, bool grouped) {
  // the compiler's tensors have symbols for sizes
  bool same_sizes = query.dim() == 4 && query.sym_size(3) == key.sym_size(3) && key.sym_sizes() == value.sym_sizes() &&
                    query.sym_numel() != 0 && key.sym_numel() != 0 && (grouped || query.sym_size(1) == key.sym_size(1));
  bool plain_mask = !mask || !mask->defined() || (!mask->requires_grad() && (mask->dim() == 2 || mask->dim() == 4));
  bool fused = same_sizes && plain_mask && dropout == 0 && at::globalContext().userEnabledFlashSDP();
  return static_cast<int64_t>(fused ? at::SDPBackend::overrideable : at::SDPBackend::math);
}

// A key or value for each head of the query, and the gradient of that.
Tensor for_each_head(const Tensor& key, const Tensor& query) {
  return key.repeat_interleave(query.size(1) / key.size(1), 1);
}

Tensor for_each_head_backward(const Tensor& grad, const Tensor& key) {
  return grad.unflatten(1, {key.size(1), -1}).sum(2);
}

// The compiler knows attention and its gradients with the strides of the query, key and value.
Tensor laid_out_as(const Tensor& model, const Tensor& values) {
  return to_device(at::empty_like(on_host(model)).copy_(values));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, double dropout, bool causal,
    bool, std::optional<double> scale) {
  count(kernels, "aten::scaled_dot_product_attention");
  auto added = mask ? std::optional<Tensor>(on_host(*mask)) : std::nullopt;
  auto [output, logsumexp] = at::_scaled_dot_product_flash_attention_for_cpu(
      on_host(query), for_each_head(on_host(key), query), for_each_head(on_host(value), query), dropout, causal, added, scale);
  auto seed = empty({}, at::kLong, {}, {}, {}, {}), offset = empty({}, at::kLong, {}, {}, {}, {});  // the compiler keeps them
  return {laid_out_as(query, output), to_device(logsumexp), Tensor(), Tensor(), query.size(2), key.size(2), seed, offset, Tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& mask, std::array<bool, 4>,
    const Tensor& output, const Tensor& logsumexp, const Tensor&, const Tensor&, c10::SymInt, c10::SymInt, double dropout,
    bool causal, const Tensor&, const Tensor&, std::optional<double> scale) {
  count(kernels, "aten::scaled_dot_product_attention_backward");
  auto added = mask.defined() ? std::optional<Tensor>(on_host(mask)) : std::nullopt;
  auto [query_grad, key_grad, value_grad] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      on_host(grad), on_host(query), for_each_head(on_host(key), query), for_each_head(on_host(value), query), on_host(output),
      on_host(logsumexp), dropout, causal, added, scale);
  return {laid_out_as(query, query_grad), laid_out_as(key, for_each_head_backward(key_grad, key)),
          laid_out_as(value, for_each_head_backward(value_grad, value)), Tensor()};
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &choose_attention)
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &item);
  m.impl("record_stream", &record_stream);
  m.impl("histc", &histogram);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("_scaled_dot_product_fused_attention_overrideable", &attention);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", &attention_backward);
  // torch would make these of several operators; on CUDA they are one kernel.
  for (const char* name : {"native_layer_norm", "native_layer_norm_backward"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

// Autocast has the lists that torch has for CUDA.
TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FLOAT32(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FLOAT32_BY_DTYPE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define PROMOTED(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOWER_PRECISION)
  AT_FORALL_FP32(FLOAT32)
  AT_FORALL_FP32_SET_OPT_DTYPE(FLOAT32_BY_DTYPE)
  AT_FORALL_PROMOTE(PROMOTED)
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("kernels", [] { std::lock_guard<std::mutex> guard(counts_lock); return kernels; });
  m.def("copies", [] { std::lock_guard<std::mutex> guard(counts_lock); return copies; });
  m.def("synchronisations", [] { std::lock_guard<std::mutex> guard(counts_lock); return synchronisations; });
  m.def("synchronise", [] { synchronise("device"); });
  m.def("sync_debug_mode", [](const std::string& mode) { return std::exchange(sync_debug_mode, mode); });
  m.def("float64", [](bool has) { return std::exchange(has_float64, has); });
  m.def("used_bytes", [] { return used_bytes.load(); });
  m.def("peak_bytes", [] { return peak_bytes.load(); });
  m.def("reset_peak", [] { peak_bytes = used_bytes.load(); });
  m.def("capacity", [] { return capacity.load(); });
  m.def("set_capacity", [](int64_t bytes) { return capacity.exchange(bytes); });
  m.def("default_generator", [] { return default_generator(); });
}
