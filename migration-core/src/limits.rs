//! All bounds of what a peer may send. Nothing is allocated by a length before it was compared with
//! its bound.
//!
//! The longest strings: 512 bytes of an error's text; 64 of a name.

/// Most lanes for pages: as many as the largest hosts have use for.
pub const MAX_STREAMS: u16 = 128;
/// Most demand lanes.
pub const MAX_DEMAND_LANES: u16 = 16;
/// Largest body of a frame: a state chunk with its fields. Page data is not part of the body.
pub const MAX_BODY: usize = STATE_CHUNK + 4096;
/// Most bytes of page data in one frame: large enough that a frame's fixed cost vanishes, small
/// enough that a fault or a cancel never waits long behind one.
pub const MAX_PAYLOAD: usize = 2 << 20;
/// Most runs of pages in one frame.
pub const MAX_EXTENTS: usize = 1024;
/// Most pages in one request.
pub const MAX_REQUESTS: usize = 1024;
/// Most bytes of a strategy's name in a hello.
pub const MAX_STRATEGY_NAME: usize = 64;
/// Most bytes of the name of a device, and of a section of the state.
pub const MAX_SECTION_NAME: usize = 64;
/// Most bytes of the text of an error.
pub const MAX_ERROR_TEXT: usize = 512;
/// Most bytes of a VMM's own configuration, and of host needs, in a hello.
pub const MAX_CONFIG: usize = 256 << 10;
/// Most devices in a hello.
pub const MAX_DEVICES: usize = 1024;
/// Most RAM regions of a VM. KVM itself offers 509 or 32,764 slots; real machines use a handful,
/// and the bound keeps a hostile hello small.
pub const MAX_REGIONS: usize = 512;
/// Most pages of a VM: 2^34 pages are 64 TiB, the most that KVM maps on x86-64 with 46 address
/// bits. The limit bounds what a peer can make us allocate for sets of pages (8 MiB of each set of
/// the largest VM while it is uniform, 2 GiB if it is not; a destination refuses far less, see
/// [`ReceiverOptions::max_ram_bytes`](crate::engine::ReceiverOptions::max_ram_bytes)).
pub const MAX_PAGES: u64 = 1 << 34;
/// Bytes of state in one frame.
pub const STATE_CHUNK: usize = 1 << 20;
/// Most bytes of a VM's whole state. Bounds what a destination holds in memory beside guest RAM.
pub const MAX_STATE: usize = 64 << 20;
/// Most sections of a VM's state: 16 for each of 256 vCPUs, and as many devices.
pub const MAX_SECTIONS: usize = 8192;
/// Most bytes of one section. The largest that real devices have (a GPU's or a vhost device's
/// state) go through several steps, see [`Device`](crate::device::Device); a vCPU takes about 20
/// KiB.
pub const MAX_SECTION: usize = 16 << 20;
/// Most bytes of a host's identity, for a fence.
pub const MAX_IDENTITY: usize = 1024;
/// Most entries of a store table: a page's entry fits into a byte.
pub const MAX_ENTRIES: usize = 255;
/// Most stores of one entry: each has a copy of every page.
pub const MAX_ENTRY_STORES: usize = 8;
/// Most bytes of a store's name.
pub const MAX_STORE_NAME: usize = 64;
/// Most runs of pages in one frame that says where pages are. A put has at most 4096 pages; a frame
/// for one that is scattered takes 12 KiB.
pub const MAX_LOCATED_RUNS: usize = 1024;
