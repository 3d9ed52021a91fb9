pub struct Adapt;
