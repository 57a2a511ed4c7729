-- Removes some blocks of a forgotten namespace, also of one whose user has crashed in between.
--
-- Keys: dying. Arguments: the names of the keys of blocks and of a block without the id, most
-- blocks. Answers with 1 as long as there may be more.
local id = redis.call('SRANDMEMBER', KEYS[1])
if not id then return { 'ok', '0' } end
local numbers = redis.call('SPOP', ARGV[1] .. id, ARGV[3])
local keys = {}
for i, number in ipairs(numbers) do keys[i] = ARGV[2] .. id .. ':' .. number end
if #keys > 0 then redis.call('UNLINK', unpack(keys)) end
if #keys < tonumber(ARGV[3]) then redis.call('SREM', KEYS[1], id) end
return { 'ok', '1' }
