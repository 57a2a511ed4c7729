use super::{Linear, PushOrder};
use crate::{page::PageRange, page_set::PageSet};

/// Pushes blocks of 16 pages in a random order that depends only on the seed, and ignores faults:
/// the baseline for orders that claim to predict the guest.
#[derive(Clone, Debug)]
pub struct Random {
    keys: [u64; 3],
    /// The number of blocks chosen so far.
    drawn: u64,
    /// The block chosen last.
    block: PageRange,
    rest: Linear,
}

/// The number of pages in a block.
const BLOCK: u64 = 16;

impl Random {
    /// Returns the order with this seed.
    pub fn new(seed: u64) -> Self {
        let mut state = seed;
        let keys = std::array::from_fn(|_| splitmix64(&mut state));
        Self { keys, drawn: 0, block: PageRange::new(0, 0), rest: Linear::default() }
    }

    /// Returns the position of `number` in a permutation of all numbers of `bits` bits. Each step
    /// is a bijection on these numbers (adding a key, multiplying by an odd number, mixing high
    /// bits into lower ones), so their composition is one, and nothing has to be stored.
    fn shuffle(&self, number: u64, bits: u32) -> u64 {
        let mask = (1 << bits) - 1;
        self.keys.iter().fold(number, |x, key| {
            let x = x.wrapping_add(*key).wrapping_mul(0xbf58_476d_1ce4_e5b9) & mask;
            x ^ (x >> bits.div_ceil(2).max(1))
        })
    }

    /// Returns the next block that a VM of `pages` pages has.
    fn draw(&mut self, pages: u64) -> Option<PageRange> {
        let bits = pages.div_ceil(BLOCK).next_power_of_two().trailing_zeros();
        while self.drawn < 1 << bits {
            let first = self.shuffle(self.drawn, bits) * BLOCK;
            self.drawn += 1;
            if first < pages {
                return Some(PageRange::new(first, BLOCK));
            }
        }
        None
    }
}

impl Default for Random {
    fn default() -> Self {
        Self::new(0)
    }
}

impl PushOrder for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn begin(&mut self, _unsent: &PageSet, _heat: &[u8]) {
        *self = Self { keys: self.keys, ..Self::default() };
    }

    fn fault(&mut self, _page: u64) {}

    fn next(&mut self, unsent: &PageSet, most: u64) -> Option<PageRange> {
        loop {
            if let Some(page) = unsent.first_in(self.block) {
                return unsent.run_at(page, most.clamp(1, self.block.end() - page));
            }
            match self.draw(unsent.capacity()) {
                Some(block) => self.block = block,
                None => return self.rest.next(unsent, most),
            }
        }
    }
}

/// Steele, Lea and Flood's generator (OOPSLA 2014).
fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::{super::test_util::*, *};

    fn order_of(seed: u64, pages: u64) -> Vec<(u64, u64)> {
        push(&mut Random::new(seed), &mut PageSet::full(pages), 64, usize::MAX)
    }

    #[test]
    fn the_seed_alone_decides() {
        assert_eq!(order_of(1, 3000), order_of(1, 3000));
        assert_ne!(order_of(1, 3000), order_of(2, 3000));
    }

    #[test]
    fn it_is_a_permutation_of_blocks_and_no_scan() {
        for pages in [1, 16, 17, 1000, 16_384, 20_000] {
            let runs = order_of(7, pages);
            let mut blocks: Vec<_> = runs.iter().map(|r| r.0 / BLOCK).collect();
            blocks.sort_unstable();
            assert!(blocks.iter().copied().eq(0..pages.div_ceil(BLOCK)), "{pages} pages");
            let neighbours = runs.windows(2).filter(|w| w[0].0.abs_diff(w[1].0) == BLOCK).count();
            assert!(pages < 1000 || neighbours * 10 < runs.len(), "{pages} pages: {neighbours} neighbours in turn");
        }
    }
}
